"""How a model learns: gradients over parts and processes, its place on them, adapters."""
