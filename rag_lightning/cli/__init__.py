"""The command line: ``rag-lightning COMMAND key=value …``; the only importer of Hydra."""
