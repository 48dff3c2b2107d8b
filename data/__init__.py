"""The corpora: a folder each with its `prepare.py`. What these write beside them is not part of the repository."""
