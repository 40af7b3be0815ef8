"""Rewards and masks changed before the credit, and the groups that are trained on."""
