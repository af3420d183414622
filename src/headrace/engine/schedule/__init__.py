"""Which request gets which tokens and blocks in a step. Plain Python on ints: no tensors, no clock."""
