"""The bundled film world: 4,000 one-passage films and questions about them, from MetaQA (CC BY 3.0).

``README.md`` beside this file states source, licence, schema and counts; ``make.py`` builds the files again. Name them
as ``bundled:films/passages.jsonl.gz``, ``bundled:films/train.jsonl.gz`` and so on wherever a data path is asked for.
"""
