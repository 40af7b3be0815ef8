"""Tasks of reasoning-gym: problems without end, made from seeds, each with a scorer of its own."""
