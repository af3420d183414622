"""The engine: requests, the scheduler that serves them, and the loop that runs its plans."""
