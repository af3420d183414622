"""Training: from a recipe to metrics, snapshots and a Hugging Face folder."""
