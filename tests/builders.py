"""Small forests for tests, by hand and random (all numbers exact in fp32), and short ways to run credit on them."""

from collections.abc import Sequence
from random import Random

import pytest
import torch
from reference_credit import paths
from torch import Tensor

from stepcredit.config.algorithms import ALGORITHMS
from stepcredit.credit import CREDIT, assign
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.growth.options import RECORDED
from stepcredit.losses.objective import Objective
from stepcredit.losses.options import ObjectiveOptions
from stepcredit.losses.table import LOSSES
from stepcredit.section import check_options

LOGPROBS = ("old_logprobs", "ref_logprobs", "prm_logprobs")
STEPS = ("prefix_value", "step_index")
# algorithms that sample; the others take completions from the data, which the embedded task does not have
SAMPLING = [name for name, row in ALGORITHMS.items() if row.growth.get("name") not in RECORDED]
PROMPT_VALUE = 0.25  # of every prompt, for credit that reads one
VERL = {"centering": "authors", "batch_norm": True, "last_token": "zero", "whitening": True}  # of PRIME
VARIANTS = [
    *((name, {}) for name in CREDIT if name != "gae"),  # which reads a critic's values: test_gae.py
    ("opo", {"leave_one_out": True}),
    ("gpg", {"alpha": "nonzero"}),
    ("gpg", {"alpha": "none"}),
    ("reward_to_go", {"baseline": "mean"}),
    ("reward_to_go", {"baseline": "none"}),
    *(("spro", option) for option in ({"beta": 2.0}, {"uniform": "drop"}, {"normalize": "batch"}, {"sign": -1.0})),
    ("spro", {"cumsum": False, "uniform": "drop", "normalize": "batch"}),
    *(("prime", option) for option in ({"estimator": "grpo"}, {"estimator": "reinforce"}, {"centering": "authors"})),
    *(("prime", {"beta": 2.0, **option}) for option in ({"batch_norm": True}, {"last_token": "zero"}, {"gamma": 0.5})),
    ("prime", {"whitening": True}),
    ("prime", {"beta": 1.0, "outcome_coef": 5.0, "process_coef": 5.0, **VERL}),
    *(("treerpo", {"scale": scale, "tau": 0.0}) for scale in ("variance", "sqrt", "std", "none")),
    ("vine", {"whitening": True}),
]
variants = pytest.mark.parametrize("name, options", VARIANTS, ids=[f"{n}-{o}" for n, o in VARIANTS])
Rewards = Sequence[Sequence[float | None]]


def flat_forest(lengths: Sequence[Sequence[int]], rewards: Rewards, **columns: Sequence) -> Forest:
    """Groups of completions of one segment each; `columns[name][group][completion]` is a list over tokens."""
    trees = []
    for group, sizes in enumerate(lengths):
        segments = [
            Segment(
                list(range(10 * index, 10 * index + size)),
                reward=rewards[group][index],
                columns={name: values[group][index] for name, values in columns.items()},
            )
            for index, size in enumerate(sizes)
        ]
        trees.append(Tree(Problem(id=f"g{group}"), [1, 2], segments))
    return Forest.from_trees(trees)


def random_trees(
    seed: int,
    kind: str = "flat",
    num_trees: int = 4,
    unsampled: float = 0.0,
    unjudged: float = 0.25,
    columns: Sequence[str] = LOGPROBS,
) -> list[Tree]:
    """Ragged trees: "flat" = one segment a completion, "chain" = completions of several segments, "deep" = branching.

    All have steps with values (`STEPS`), beside the columns that are asked for. The segments of a chain do not stand
    together. Leaves have a reward or none; parts of the segments are unsampled.
    """
    random = Random(seed)
    return [_random_tree(random, f"{kind}-{n}", kind, unsampled, unjudged, columns) for n in range(num_trees)]


def random_forest(seed: int, kind: str = "flat", **options) -> Forest:
    return Forest.from_trees(random_trees(seed, kind, **options))


def squeezed(trees: list[Tree]) -> list[Tree]:
    """The same trees with values in [0, 1], token rewards included: up to 54 tokens of 1/128 and a reward of 1/2."""
    for tree in trees:
        for segment in tree.segments:
            if "token_rewards" in segment.columns:
                segment.columns["token_rewards"] = [abs(x) / 128 for x in segment.columns["token_rewards"]]
            if segment.reward is not None:
                segment.reward /= 2
    return trees


def judge_only_sampled(tree: Tree) -> None:
    """A completion without a sampled token has nothing to be judged for."""
    for path in paths(tree):
        if not any(tree.segments[index].sampled for index in path):
            tree.segments[path[-1]].reward = None


def run(forest: Forest, name: str, column: str = "advantages", **options) -> Tensor:
    """The column that a credit function of the table assigns."""
    return assign(with_baselines(forest), name, CREDIT[name], options).token[column]


def with_baselines(forest: Forest) -> Forest:
    """With the columns of prompts that credit functions read, where it does not have them."""
    greedy = forest.tree["prompt_length"] % 3 / 2  # as `reference_credit.remax`
    columns = {
        "greedy_return": greedy[forest.token_tree],
        "prompt_value": torch.full((forest.num_tokens,), PROMPT_VALUE),
    }
    return forest.with_token(**{name: values for name, values in columns.items() if not forest.has(name)})


def objective_of(
    loss: str = "clip",
    constant: float = 1.0,
    unit: str | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    **options,
) -> Objective:
    """An objective from the options of its parts, by their names."""
    given = {name: options.pop(name) for name in list(options) if name in ObjectiveOptions.model_fields}
    given["kl"] = {"coef": kl_coef, "estimator": kl_estimator}
    check_options("loss", loss, LOSSES[loss], options)
    return Objective(LOSSES[loss], options, ObjectiveOptions(**given), constant, unit)


def is_near(found: Tensor, expected: Sequence, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), atol=atol, rtol=0)


def _steps(index: int, parent: int, size: int) -> dict[str, list[float]]:
    """Steps of up to three tokens; each segment begins one."""
    numbers = [10.0 * (parent + 1) + 5 * index + place // 3 for place in range(size)]
    return {"step_index": numbers, "prefix_value": [(7 * number % 9) / 8 for number in numbers]}


def _random_tree(
    random: Random, name: str, kind: str, unsampled: float, unjudged: float, columns: Sequence[str]
) -> Tree:
    segments: list[Segment] = []
    tips: list[int] = []
    for index in range(random.randint(1, 4) if kind == "flat" else random.randint(3, 9)):
        parent = -1
        if kind == "deep":
            parent = random.randint(-1, index - 1)
        elif kind == "chain":
            parent = random.choice([-1, *tips])
            tips = [tip for tip in tips if tip != parent] + [index]
        size = random.randint(1, 6)
        segments.append(
            Segment(
                [random.randint(0, 50) for _ in range(size)],
                parent,
                sampled=random.random() >= unsampled,
                columns={column: [random.randint(-64, 64) / 64 for _ in range(size)] for column in columns}
                | _steps(index, parent, size),
                extra={"note": index} if random.random() < 0.5 else {},
            )
        )
    parents = {segment.parent for segment in segments}
    for index, segment in enumerate(segments):
        if index in parents:
            segment.finish = "cut"
            continue
        segment.finish = random.choice(["stop", "length"])
        if random.random() >= unjudged:
            segment.reward = random.choice([0.0, 1.0, 1.0, 0.5])
            segment.rewards = {"exact": segment.reward}
    prompt = [random.randint(0, 50) for _ in range(random.randint(1, 4))]
    return Tree(Problem(id=name, question="?", answer="1"), prompt, segments, extra={"seed": name})
