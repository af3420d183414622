"""A plan on its way through the model: packed, sent to every rank, computed, sampled."""
