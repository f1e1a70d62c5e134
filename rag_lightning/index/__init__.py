"""Which passages are nearest to a question: numbers in, numbers out.

Read in this order: :mod:`~rag_lightning.index.base` (the similarity, and what every index promises),
:mod:`~rag_lightning.index.exact` (torch, the oracle, needs nothing else), :mod:`~rag_lightning.index.faiss` (everything
that FAISS builds from a factory string), :mod:`~rag_lightning.index.build` (the one place that chooses between them),
:mod:`~rag_lightning.index.vectors` (float32 rows on disk) and :mod:`~rag_lightning.index.snapshot` (an index with its
vectors and its manifest, published whole or not at all). An index knows row numbers only; texts are the corpus's.
"""
