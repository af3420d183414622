"""The one seam of attention, `ctx.attend(layer, q, k, v)`: over whole sequences, or over the paged cache."""
