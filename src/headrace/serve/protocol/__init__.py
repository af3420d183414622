"""The HTTP protocol: the table of fields, requests, and the shapes of answers."""
