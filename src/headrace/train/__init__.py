"""Training: a recipe, data that is generated or read, one step, a Hugging Face folder at the end."""
