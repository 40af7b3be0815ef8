"""The algorithms: a frozen record each, naming its parts and their defaults.

An algorithm only sets defaults: every part can be changed in the config. Adding one is a row here.
"""

from collections.abc import Mapping, Sequence
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
        credit_options, loss, objective, growth, filter, optim, critic, sampler: defaults that differ from those of
            the parts and of the schema; `growth` for trees, and for completions of the data.
        shapers: by name, or name and options; a list of the user's takes their place.
        several_steps: why several optimiser steps on a batch are meant although the loss has no ratio; empty: they are
            not.
        data: what it takes beside models and answers that can be checked, in a few words.
        group_size: completions of a problem, where it differs from the schema's.
    """

    credit: str
    paper: str
    summary: str
    credit_options: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    growth: Mapping[str, Any] = field(default_factory=dict)
    filter: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)
    shapers: Sequence[str | Mapping[str, Any]] = ()
    several_steps: str = ""
    data: str = ""
    group_size: int | None = None
    critic: Mapping[str, Any] = field(default_factory=dict)
    sampler: Mapping[str, Any] = field(default_factory=dict)


MEAN_OF_MEANS = {"aggregate": "seq_mean_token_mean"}
TREES = {"name": "tree", "num_branches": 8, "depth": 3, "step": {"tokens": 384}}

ALGORITHMS = {
    "grpo": Algorithm(
        "grpo",
        "2402.03300",
        "group z-score",
        objective=MEAN_OF_MEANS,
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
    "reward_to_go": Algorithm(
        "reward_to_go", "textbook", "returns from each token on, for dense rewards", data="token rewards"
    ),
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
        objective=MEAN_OF_MEANS,
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
        objective=MEAN_OF_MEANS,
        growth=TREES,
    ),
    "prime": Algorithm(
        "prime",
        "2502.01456",
        "leave-one-out mean, plus the return of an implicit process reward model",
        credit_options={"beta": 0.05},
        filter={"enabled": True},
    ),
    "remax": Algorithm(
        "remax",
        "2310.10505",
        "reward less that of one greedy completion of the problem",
        loss={"name": "reinforce"},
        objective={"aggregate": "seq_mean_token_sum"},
        data="a greedy completion of each problem",
    ),
    "gpg": Algorithm(
        "gpg",
        "2504.02546",
        "group mean, scaled for groups that differ, without ratio and clip",
        loss={"name": "reinforce"},
    ),
    "dapo": Algorithm(
        "grpo",
        "2503.14476",
        "group z-score, wider clip above, only groups that differ, length is punished",
        loss={"clip_low": 0.2, "clip_high": 0.28},
        filter={"enabled": True, "keep": "varied"},
        shapers=("overlong",),
    ),
    "gspo": Algorithm(
        "grpo",
        "2507.18071",
        "group z-score, one ratio and clip for a whole completion",
        loss={"name": "gspo"},
        objective=MEAN_OF_MEANS,
        optim={"num_minibatches": 4},
    ),
    "cispo": Algorithm(
        "grpo",
        "2506.13585",
        "group z-score, clipped importance weights that keep every gradient",
        loss={"name": "cispo"},
    ),
    "raft": Algorithm(
        "reward_to_go",
        "2504.11343",
        "log-likelihood of the completions with a reward above 0",
        credit_options={"baseline": "none"},
        loss={"name": "reinforce"},
        objective={"aggregate": "seq_mean_token_sum"},
        shapers=("positives_only",),
        several_steps="RAFT fits the completions that it selected, as supervised learning does (arXiv 2504.11343)",
    ),
    "raft_pp": Algorithm(
        "reward_to_go",
        "2504.11343",
        "raw reward of the completions with one above 0, clipped",
        credit_options={"baseline": "none"},
        objective=MEAN_OF_MEANS,
        shapers=("positives_only",),
    ),
    "reinforce_rej": Algorithm(
        "reward_to_go",
        "2504.11343",
        "raw reward without a baseline, clipped, in groups that differ",
        credit_options={"baseline": "none"},
        objective=MEAN_OF_MEANS,
        shapers=("drop_uniform",),
    ),
    "em_pg": Algorithm(
        "dr_grpo",
        "2504.18587",
        "group mean, several steps on a batch without ratio and clip",
        loss={"name": "reinforce"},
        optim={"num_minibatches": 4},
        several_steps="the M-step of EM policy gradient takes several on the samples of its E-step (arXiv 2504.18587)",
    ),
    "unlikeliness": Algorithm(
        "grpo",
        "2506.02355",
        "group z-score of rewards that are lower for what is likely anyway",
        objective=MEAN_OF_MEANS,
        optim={"num_epochs": 2},
        shapers=({"name": "drop_uniform", "rewards": "raw"}, "unlikeliness"),
    ),
    "posterior_grpo": Algorithm(
        "grpo",
        "2508.05170",
        "group z-score of the outcome, plus that of the thinking where it is right",
        objective=MEAN_OF_MEANS,
        shapers=("outcome_gate",),
        data="reward functions of outcome and thinking",
    ),
    "vine": Algorithm(
        "vine",
        "2410.01679",
        "change of the value in a step, by rollouts from both of its ends",
        data="rollouts from every step",
    ),
    "pav": Algorithm(
        "sum",
        "2410.08146",
        "reward less the others', plus what a step changes in the chance of a prover",
        credit_options={
            "sum": [{"name": "rloo"}, {"name": "vine", "weight": 3.0, "options": {"best_of": 4}}],
        },
        loss={"name": "reinforce"},
        objective={"kl": {"estimator": "k3", "coef": 0.001}},
        data="rollouts from every step",
    ),
    "rebel": Algorithm(
        "dr_grpo",
        "2404.16767",
        "log-ratio differences fitted to reward differences, over all pairs",
        loss={"name": "squared", "centre": "group"},
        objective=MEAN_OF_MEANS,
        optim={"num_epochs": 4},
    ),
    "astar_po": Algorithm(
        "prompt_baseline",
        "2505.20686",
        "log-ratio to the reference fitted to the reward less a prepared value",
        loss={"name": "squared", "anchor": "reference", "scale": 1e-3},
        objective=MEAN_OF_MEANS,
        group_size=1,
        data="samples of the reference before training",
    ),
    "apa": Algorithm(
        "gae",
        "2306.02231",
        "log-ratio of each token to the reference fitted to the advantage of a critic",
        credit_options={"lam": 0.95, "whiten": True},
        loss={"name": "squared", "unit": "token", "anchor": "reference", "scale": 0.1},
        optim={"num_epochs": 2},
    ),
    "direct_advantage": Algorithm(
        "spo_tree",
        "2412.18279",
        "log-ratio of a step to the reference fitted to its value over its siblings'",
        loss={"name": "squared", "unit": "step", "anchor": "reference", "scale": 0.01},
        objective=MEAN_OF_MEANS,
        growth=TREES,
    ),
    "dpo": Algorithm(
        "dr_grpo",
        "2305.18290",
        "the chosen completion of a pair is made likelier than the rejected one",
        loss={"name": "dpo"},
        objective=MEAN_OF_MEANS,
        growth={"name": "pairs"},
        shapers=("drop_uniform",),
        data="preference pairs",
    ),
    "ipo": Algorithm(
        "dr_grpo",
        "2310.12036",
        "the log-ratio of chosen to rejected is fitted to a margin",
        loss={"name": "ipo"},
        objective=MEAN_OF_MEANS,
        growth={"name": "pairs"},
        shapers=("drop_uniform",),
        data="preference pairs",
    ),
    "sft": Algorithm(
        "reward_to_go",
        "textbook",
        "log-likelihood of the completions of the data",
        credit_options={"baseline": "none"},
        loss={"name": "reinforce"},
        growth={"name": "demonstrations"},
        several_steps="the completions are the data's, whatever the policy is",
        data="demonstrations",
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
        shapers=("running_scale",),
    ),
    "t_ppo": Algorithm(
        "gae",
        "2506.15050",
        "PPO on the new tokens of completions that go on in later iterations",
        credit_options={"lam": 1.0, "lam_policy": 0.95, "bootstrap": "hold_last", "whiten": True},
        critic={"learn_from": "finished"},
        sampler={"window": 384},
    ),
}


def algorithm(name: str) -> Algorithm:
    """The algorithm of this name."""
    if name not in ALGORITHMS:
        raise UserError(f"algorithm: '{name}' is not known; {did_you_mean(name, ALGORITHMS)}")
    return ALGORITHMS[name]
