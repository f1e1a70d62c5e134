"""Decoders turn a generator, encoded contexts and a document prior into answers; all are batched over questions.

Read ``options`` (what is asked and what comes back), ``beam`` (the one search loop), then ``rag_token`` (one search
over the mixture of the passages) and ``rag_sequence`` (one search for each passage, candidates ranked by the
marginal: fast or thorough). ``constraints`` holds the rules that forbid or force tokens. A generator in training
mode samples dropout: call ``eval()`` before decoding.
"""
