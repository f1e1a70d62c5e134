"""Methods: what changes which examples are trained on, when, and beside which other tasks."""
