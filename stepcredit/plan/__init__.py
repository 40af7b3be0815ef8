"""The memory that a run takes, before it starts."""
