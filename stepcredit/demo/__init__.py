"""What `stepcredit train` does without options: a task, a model that comes with the package, and its settings."""
