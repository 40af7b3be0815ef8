"""The settings with which the embedded model learns the embedded task on a laptop."""

from typing import Any

EMBEDDED_RECIPE: dict[str, Any] = {
    "sampler": {"max_new_tokens": 128, "max_rows": 512},
    "optim": {"learning_rate": 4e-4, "schedule": "cosine"},
    "train": {"iterations": 120},
    "eval": {"num_problems": 600},
    "prm": {"learning_rate": 4e-3, "reference": "policy"},  # the policy runs away from a frozen one
    "prefix_values": {"num_rollouts": 5},  # the nine of the paper take most of the time
    "critic": {"learning_rate": 1e-3, "num_minibatches": 4},
    "filter": {"enabled": False},  # most problems of the base model are too hard for the window
}
EMBEDDED_TREES: dict[str, Any] = {  # about as many tokens an iteration as 16 groups of 8
    "growth": {"num_branches": 3, "depth": 2, "step": {"tokens": None, "delimiters": ["task"]}},
    "train": {"problems_per_iteration": 17},
}
EMBEDDED_WINDOW: dict[str, Any] = {"sampler": {"window": 48}}
EMBEDDED_CREDIT: dict[str, dict[str, Any]] = {  # log-ratios of a tiny model at this learning rate are large
    "spro": {"beta": 0.003},
    "prime": {"process_coef": 0.1},
}
