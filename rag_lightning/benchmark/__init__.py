"""How fast this machine trains and answers, beside transformers' RAG and beside the bare models.

Read in this order: :mod:`~rag_lightning.benchmark.shape` (sizes, as data), :mod:`~rag_lightning.benchmark.lengths` and
:mod:`~rag_lightning.benchmark.texts` (what is read), :mod:`~rag_lightning.benchmark.world` (one set of weights, one set
of batches), :mod:`~rag_lightning.benchmark.sides` (a training step of each side), :mod:`~rag_lightning.benchmark.parts`
(what is measured), :mod:`~rag_lightning.benchmark.timing` and :mod:`~rag_lightning.benchmark.memory` (how).
"""
