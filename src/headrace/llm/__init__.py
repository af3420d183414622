"""What users hold in a process: `LLM`, `AsyncLLM`, their options and outputs, and how an engine is assembled."""
