"""Benchmarks: the load generator, workloads, interleaved pairs, random checkpoints, machine rates."""
