"""What observes a forest and adds columns to it before the credit is assigned."""
