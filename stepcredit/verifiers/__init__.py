"""What judges completions: reward functions (`reward`), their worker processes, the judge of forests."""
