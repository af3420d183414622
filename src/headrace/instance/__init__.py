"""One engine in a process of its own: the messages, the process, its client and its supervisor."""
