"""Encoders turn a question into a vector ``q_BD`` and a passage into a vector ``p_ND``; their similarity is the score."""
