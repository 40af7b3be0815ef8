"""Runs, rollouts and tokens as people look at them, in a terminal."""
