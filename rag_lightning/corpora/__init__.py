"""What is searched and what is asked: files in, checked records out.

``passages`` reads a corpus in any of the four formats and names its content by a hash; ``questions`` reads questions
and writes predictions; ``warmup`` makes training examples out of passages alone. ``labelled``, ``tagged`` and
``relations`` read texts with a class, words with entity tags, and two entities with their relation. ``films`` is the
small world that ships with the package. A bad line names its file, line and field; nothing is silently dropped.
"""
