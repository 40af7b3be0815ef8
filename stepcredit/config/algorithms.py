"""The algorithms: a frozen record each, naming its parts and their defaults.

An algorithm only sets defaults: every part can be changed in the config. Adding one is a row here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepcredit.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Algorithm:
    """
    Attributes:
        credit: a name of `stepcredit.credit.CREDIT`.
        paper: arXiv id.
        summary: one line for `--help` and the docs.
        credit_options, loss, objective, growth, filter, critic: defaults that differ from those of the parts and of the
            schema.
    """

    credit: str
    paper: str
    summary: str
    credit_options: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    growth: Mapping[str, Any] = field(default_factory=dict)
    filter: Mapping[str, Any] = field(default_factory=dict)
    critic: Mapping[str, Any] = field(default_factory=dict)


TREES = {"name": "tree", "num_branches": 8, "depth": 3, "step": {"tokens": 384}}

ALGORITHMS = {
    "grpo": Algorithm(
        "grpo",
        "2402.03300",
        "group z-score",
        objective={"aggregate": "seq_mean_token_mean"},
    ),
    "dr_grpo": Algorithm(
        "dr_grpo",
        "2503.20783",
        "group mean, constant length divisor",
        objective={"aggregate": "sum_over_constant"},
    ),
    "rloo": Algorithm("rloo", "2402.14740", "leave-one-out mean"),
    "reinforce_pp": Algorithm("reinforce_pp", "2501.03262", "reward-to-go, whitened over the batch"),
    "reinforce_pp_baseline": Algorithm("reinforce_pp_baseline", "2501.03262", "group mean, whitened over the batch"),
    "reward_to_go": Algorithm("reward_to_go", "textbook", "returns from each token on, for dense rewards"),
    "opo": Algorithm(
        "opo",
        "2505.23585",
        "length-weighted optimal baseline, exactly on-policy",
        loss={"name": "reinforce"},
    ),
    "spro": Algorithm(
        "spro",
        "2507.01551",
        "group z-score plus masked step advantage of the policy's own log-ratio",
        credit_options={"beta": 0.05},
        objective={"aggregate": "seq_mean_token_mean"},
    ),
    "treerpo": Algorithm(
        "treerpo",
        "2506.05183",
        "value of a step against its siblings' in a tree of samples",
        objective={"aggregate": "seq_mean_token_mean", "kl": {"estimator": "k3", "coef": 0.001}},
        growth=TREES,
    ),
    "spo_tree": Algorithm(
        "spo_tree",
        "2505.23564",
        "value of a step less its parent's in a tree of samples",
        objective={"aggregate": "seq_mean_token_mean"},
        growth=TREES,
    ),
    "prime": Algorithm(
        "prime",
        "2502.01456",
        "leave-one-out mean, plus the return of an implicit process reward model",
        credit_options={"beta": 0.05},
        filter={"enabled": True},
    ),
    "ppo": Algorithm(
        "gae",
        "1707.06347",
        "generalised advantages from a critic, whitened over the batch",
        credit_options={"lam": 1.0, "whiten": True},
        critic={"clip": 0.5},
    ),
    "ppo_max": Algorithm(
        "gae",
        "2307.04964",
        "PPO with clipped values, a penalty in the reward and a faster critic",
        credit_options={"lam": 0.95},
        objective={"kl": {"estimator": "k1", "coef": 0.01}},
        critic={"clip": 0.2, "learning_rate": 3e-6},
    ),
}


def algorithm(name: str) -> Algorithm:
    """The algorithm of this name."""
    if name not in ALGORITHMS:
        raise UserError(f"algorithm: '{name}' is not known; {did_you_mean(name, ALGORITHMS)}")
    return ALGORITHMS[name]
