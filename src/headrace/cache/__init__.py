"""The paged, prefix-shared KV cache on the host: plain ints, no tensors."""
