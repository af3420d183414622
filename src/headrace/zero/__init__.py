"""ZeRO: optimizer state, gradients and parameters divided over the copies of a model (Rajbhandari et al., 2020)."""
