"""Which passages are nearest to a question: numbers in, numbers out.

Read in this order: :mod:`~rag_lightning.index.base` (the similarity, and what every index promises),
:mod:`~rag_lightning.index.exact` (torch, the oracle, needs nothing else), :mod:`~rag_lightning.index.faiss` (everything
that FAISS builds from a factory string), :mod:`~rag_lightning.index.build` (the one place that chooses between them),
:mod:`~rag_lightning.index.sharded` (one index divided among processes, which speak through
:mod:`~rag_lightning.index.exchange`) and :mod:`~rag_lightning.index.bm25` (by words instead of vectors).

On disk: :mod:`~rag_lightning.index.vectors` (rows as float32, float16 or int8, written by
:mod:`~rag_lightning.index.vector_files`), :mod:`~rag_lightning.index.manifest` (what a snapshot says of itself),
:mod:`~rag_lightning.index.building` and :mod:`~rag_lightning.index.locks` (the hidden folder of a build) and
:mod:`~rag_lightning.index.snapshot` (an index with its vectors and its manifest, published whole or not at all).

Beforehand and afterwards: :mod:`~rag_lightning.index.plan` (what an index will cost, from its
:mod:`~rag_lightning.index.factory` string, timed by :mod:`~rag_lightning.index.calibrate`) and
:mod:`~rag_lightning.index.quality` (how much of the exact answer it finds). An index knows row numbers only; texts are
the corpus's.
"""
