"""Questions in, evidence out: the stage that binds an index to the corpus whose rows it numbers.

:mod:`~rag_lightning.retrieval.base` says what every retriever promises. :mod:`~rag_lightning.retrieval.dense` searches
a snapshot by query vectors, :mod:`~rag_lightning.retrieval.sparse` a BM25 index by words,
:mod:`~rag_lightning.retrieval.hybrid` both, under a score of :mod:`~rag_lightning.retrieval.fusion`;
:mod:`~rag_lightning.retrieval.rerank` scores again what any of them found, and
:mod:`~rag_lightning.retrieval.build` chooses between them. :mod:`~rag_lightning.retrieval.hard_negatives` takes what is
found and wrong as a lesson; :mod:`~rag_lightning.retrieval.encode` and :mod:`~rag_lightning.retrieval.index_builder`
(a process of its own) make what is searched. A retriever returns :class:`~rag_lightning.types.Hits`
(numbers and the snapshot's id); texts are looked up afterwards, so a refresh can never pair one snapshot's row with
another corpus's text.
"""
