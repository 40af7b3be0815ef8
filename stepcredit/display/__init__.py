"""Runs, rollouts and tokens as people look at them, in a terminal; what the page of `report` shares with it."""
