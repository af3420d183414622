"""Corpora: files in, a folder of memory-mapped tokens out, and the pieces that training reads from it."""
