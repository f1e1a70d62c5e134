"""Reports: what several runs measured, collected into one table."""
