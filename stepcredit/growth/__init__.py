"""Growing trees with a sampler: problems in, a forest out."""
