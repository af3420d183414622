"""One transformer that trains and serves, and the checkpoint folders it is read from and written to."""
