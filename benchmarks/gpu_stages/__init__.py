"""The stages of `benchmarks/gpu.py`, one file each."""
