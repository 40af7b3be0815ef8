"""Samplers that are servers elsewhere."""
