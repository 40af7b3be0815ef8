"""stepcredit: process-level reinforcement learning of LLM reasoning. Every group of rollouts is a tree."""

__version__ = "0.1.0"
