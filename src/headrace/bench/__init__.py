"""Measuring: machine rates, interleaved pairs, random checkpoints, workloads."""
