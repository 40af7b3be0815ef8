"""What to train on: the embedded chain task, or a data set."""
