"""Training of heads: a task is data, an objective and metrics; a run has one or several.

- :mod:`~rag_lightning.training.tasks.task`: what a task is, by kind
- :mod:`~rag_lightning.training.tasks.data`: its examples, its labels, the passages it may read
- :mod:`~rag_lightning.training.tasks.module`: the step
"""
