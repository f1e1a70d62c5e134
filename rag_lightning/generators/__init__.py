"""Generators score or extend a target given contexts; the passage axis is folded into the batch, ``[B * K, L]``."""
