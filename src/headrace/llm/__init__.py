"""The in-process API: `LLM`, `AsyncLLM`, their options, outputs and records, and the assembly of an engine."""
