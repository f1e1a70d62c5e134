"""Decoders turn a generator, encoded contexts and a document prior into answers; all are batched over questions.

Read ``options`` (what is asked and what comes back), ``beam`` (the one search loop), then ``rag_token`` (one search
over the mixture of the passages) and ``rag_sequence`` (one search for each passage, candidates ranked by the
marginal: fast or thorough; ``prefixes`` scores what no beam has), then ``sampling`` (the one loop that draws answers);
``decode`` chooses among them. ``constraints`` holds the rules that forbid or force tokens, ``trie`` the allowed
answers; ``text_rules`` makes both of strings and files, and ``texts`` turns what was decoded back into strings. A
generator in training mode samples dropout: call ``eval()`` before decoding.
"""
