"""Questions in, evidence out: the stage that binds an index to the corpus whose rows it numbers.

:mod:`~rag_lightning.retrieval.base` says what every retriever promises; :mod:`~rag_lightning.retrieval.dense` searches
a snapshot by query vectors. A retriever returns :class:`~rag_lightning.types.Hits` (numbers and the snapshot's id);
texts are looked up afterwards, so a refresh can never pair one snapshot's row with another corpus's text.
"""
