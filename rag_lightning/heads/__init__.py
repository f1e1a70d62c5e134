"""Heads: what a reader's states say of a text's class, its words' tags, or the relation of two entities in it."""
