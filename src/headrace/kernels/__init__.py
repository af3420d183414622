"""The op set and its implementations: torch (reference), Numba (CPU), Triton (NVIDIA GPUs)."""
