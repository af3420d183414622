"""Running a plan: pack it, send it to every rank, compute it, sample."""
