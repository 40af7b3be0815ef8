"""A run: from the config to its parts, the loop, what is kept, written and said of it."""
