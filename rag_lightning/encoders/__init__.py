"""Encoders turn a question into a vector ``q_BD`` and a passage into ``p_ND``; their similarity is the score."""
