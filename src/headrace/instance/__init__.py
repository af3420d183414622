"""One engine in a process of its own: the messages, the process, and its client."""
