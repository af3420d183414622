"""Attention behind one interface, `ctx.attend(layer, q, k, v)`: over whole sequences or over the paged cache."""
