"""Speculative decoding: who drafts, how many tokens, and which verifier (2211.17192)."""
