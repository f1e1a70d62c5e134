"""``python -m rag_lightning`` is ``rag-lightning``."""

from rag_lightning.cli.__main__ import main

if __name__ == "__main__":
    main()
