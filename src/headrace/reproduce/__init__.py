"""One file a paper: its published results beside ours, each row with what kind of evidence it is."""
