"""Corpora: build a folder of memory-mapped tokens from files, and read training pieces from it."""
