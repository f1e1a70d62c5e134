"""Training: the module takes a step, the data module owns the index, reindex decides when it is made anew."""
