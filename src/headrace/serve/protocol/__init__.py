"""What clients send and read: the table of fields, what a request asks for, and the shapes of the answers."""
