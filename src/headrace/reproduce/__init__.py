"""A file per paper: its published results beside headrace's, each row with its kind of evidence."""
