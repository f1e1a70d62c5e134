"""Text and token ids: what lies between a passage as it is read and a padded batch as a model takes it.

Reading order: ``normalise`` (comparing answers), ``chunking`` (documents to passages), ``prompts`` (how a passage and a
question are joined), ``tokenizers`` (loading, naming and training vocabularies), ``token_store`` (every passage
tokenised once, memory-mapped), ``tagging`` (entity tags, and words among word pieces). Nothing here knows a corpus
file, an index or a model.
"""
