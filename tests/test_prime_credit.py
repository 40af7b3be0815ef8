"""PRIME's credit: vectors by hand for every estimator and option, and the identities between the forms of it."""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
import reference_credit
import torch
from builders import LOGPROBS, STEPS, VERL, flat_forest, is_near, judge_only_sampled, random_forest, random_trees, run
from torch import Tensor

from stepcredit.cli.main import main
from stepcredit.config import Config, CreditConfig
from stepcredit.credit import CREDIT, assign
from stepcredit.credit.choose import build_credit
from stepcredit.credit.prime import implicit_rewards
from stepcredit.errors import UserError
from stepcredit.estimators.prm import prm_beta
from stepcredit.forest import Forest
from stepcredit.forest.ops import mean_by, sum_to_end
from stepcredit.forest.types import Problem, Segment, Tree

close = torch.testing.assert_close

SCORES = [[3, 1], [0], [1, 2, 3, -2]]  # means 2, 0, 1; the means of the others 1/2, 3/2, 1
REWARDS = [1.0, 0.0, 0.0]


def group(scores: list = SCORES, rewards: list | None = None, beta: float = 0.5) -> Forest:
    """One group whose implicit rewards at this beta are `scores`."""
    ref = [[-1.0 - i] * len(row) for i, row in enumerate(scores)]
    prm = [[x / beta - 1.0 - i for x in row] for i, row in enumerate(scores)]
    lengths = [[len(row) for row in scores]]
    return flat_forest(lengths, [rewards or REWARDS], prm_logprobs=[prm], ref_logprobs=[ref])


def outcome(forest: Forest, **options) -> Tensor:
    """The first of the two parts."""
    return CREDIT["prime"](forest, **options).outcome


def mean_score(forest: Forest, scores: Tensor) -> tuple[Tensor, Tensor]:
    """[num_tokens] the mean score of each token's completion, and how many tokens that is."""
    return mean_by(scores, forest.leaf[forest.token["segment"]], where=forest.active)


def of_others(forest: Forest, own: Tensor) -> tuple[Tensor, Tensor]:
    """[num_tokens] the mean of `own` over the other completions of the group, and their number."""
    first = forest.active & (forest.token["position"] == 0)  # one token stands for its completion
    all_of_them, count = mean_by(own, forest.token_tree, where=first)
    return (all_of_them * count - own) / (count - 1).clamp(min=1), count - 1


# ---------------------------------------------------------------------- by hand

A, B = 2 / 3 / 3**-0.5, -1 / 3 / 3**-0.5  # z-scores of 1, 0, 0
BY_HAND = [
    ({}, [1, -0.5, -0.5], [3, 0.5, -1.5, 0, 0, -1, -3]),
    ({"outcome_coef": 3.0, "process_coef": 2.0}, [3, -1.5, -1.5], [6, 1, -3, 0, 0, -2, -6]),
    ({"gamma": 0.5}, [1, -0.5, -0.5], [2.75, 0.5, -1.5, 0.625, 1.25, 0.5, -3]),
    ({"gamma": 0.0}, [1, -0.5, -0.5], [2.5, 0.5, -1.5, 0, 1, 2, -3]),
    # 3/2 x - 3/2
    ({"centering": "authors"}, [1, -0.5, -0.5], [3, 0, -1.5, 0, 0, -1.5, -4.5]),
    ({"centering": "authors", "gamma": 0.5}, [1, -0.5, -0.5], [3, 0, -1.5, 0.9375, 1.875, 0.75, -4.5]),
    # the means 2, 0, 1 have mean 1 and std 1
    ({"estimator": "grpo"}, [A, B, B], [2, 0, -1, 0, 0, -1, -3]),
    ({"estimator": "grpo", "gamma": 0.5}, [A, B, B], [2, 0, -1, 0.625, 1.25, 0.5, -3]),
    ({"estimator": "grpo", "beta": 5.0}, [A, B, B], [2, 0, -1, 0, 0, -1, -3]),
    ({"estimator": "reinforce"}, [1, 0, 0], [4, 1, 0, 4, 3, 1, -2]),
    ({"estimator": "reinforce", "gamma": 0.5}, [1, 0, 0], [3.5, 1, 0, 2.5, 3, 2, -2]),
    # x = 3, 0; 0; 1, 2, 3, 0: means 3/2, 0, 3/2 over 2, 1, 4 tokens, baselines 3/4, 3/2, 3/4
    ({"last_token": "zero"}, [1, -0.5, -0.5], [1.5, -0.75, -1.5, 3, 2.75, 1.5, -0.75]),
    ({"last_token": "zero", "estimator": "reinforce"}, [1, 0, 0], [3, 0, 0, 6, 5, 3, 0]),
    # the largest return is 3 + 1 = 1 + 2 + 3 - 2 = 4, discounted or not; without the last tokens 1 + 2 + 3 = 6
    ({"batch_norm": True}, [1, -0.5, -0.5], [0.75, 0.125, -0.375, 0, 0, -0.25, -0.75]),
    ({"batch_norm": True, "gamma": 0.5, "estimator": "reinforce"}, [1, 0, 0], [0.875, 0.25, 0, 0.625, 0.75, 0.5, -0.5]),
    ({"batch_norm": True, "last_token": "zero"}, [1, -0.5, -0.5], [0.25, -1 / 8, -0.25, 0.5, 11 / 24, 0.25, -1 / 8]),
]  # fmt: skip


@pytest.mark.parametrize("options, by_completion, process", BY_HAND, ids=[str(options) for options, *_ in BY_HAND])
def test_three_completions_by_hand(options, by_completion, process):
    """Scores 3, 1; 0; 1, 2, 3, -2 and rewards 1, 0, 0; the outcome part is the same on every token."""
    forest, options = group(), {"beta": 0.5, **options}
    wanted = [float(x) for x, row in zip(by_completion, SCORES, strict=True) for _ in row]
    is_near(outcome(forest, **options), wanted)
    is_near(run(forest, "prime", "process", **options), [float(x) for x in process])
    is_near(run(forest, "prime", **options), [a + b for a, b in zip(wanted, process, strict=True)])


def test_whitening_by_hand():
    """Advantages 4, 1.5; -2; -.5, -.5, -1.5, -3.5, of mean -2.5/7: every token counts once."""
    plain = [4, 1.5, -2, -0.5, -0.5, -1.5, -3.5]
    found = run(group(), "prime", beta=0.5, whitening=True)
    is_near(found, [(x - mean(plain)) / stdev(plain) for x in plain])
    assert float(found.mean()) == pytest.approx(0, abs=1e-6) and float(found.var()) == pytest.approx(1, abs=1e-5)
    process = run(group(), "prime", "process", beta=0.5, whitening=True)
    is_near(process, [x / stdev(plain) for x in (3, 0.5, -1.5, 0, 0, -1, -3)])


@pytest.mark.parametrize("rewards, expected", [([1, 0, 0, 0], [1, *[-1 / 3] * 3]), ([1, 1, 0], [0.5, 0.5, -1])])
def test_the_outcome_part_is_leave_one_out(rewards, expected):
    """Whatever the reward model says; of lengths 1, 2, 3, 4."""
    scores = [[0.5 * j - i for j in range(i + 1)] for i in range(len(rewards))]
    forest = group(scores, rewards)
    assert run(forest, "prime", "process").abs().max() > 0.01
    for options in ({}, VERL | {"whitening": False}):
        is_near(outcome(forest, **options)[forest.segment["start"]], expected)
        assert outcome(forest, **options).equal(run(forest, "rloo"))


def test_returns_hold_the_token_rewards():
    """A KL penalty in the reward is part of the outcome: returns 1.5 and 0.25, as for the other groups' credit."""
    forest = group([[1, 2], [3]], [1.0, 0.0])
    forest = forest.with_token(token_rewards=torch.tensor([0.25, 0.25, 0.25]))
    is_near(outcome(forest), [1.25, 1.25, -1.25])
    is_near(outcome(forest, estimator="reinforce"), [1.5, 1.5, 0.25])
    is_near(outcome(forest, estimator="grpo"), [0.5**0.5] * 2 + [-(0.5**0.5)])
    assert run(forest, "prime", "process").equal(run(forest.without_token("token_rewards"), "prime", "process"))


# ---------------------------------------------------------------------- identities

FORMS = [
    {},
    {"centering": "authors"},
    {"estimator": "grpo"},
    {"estimator": "reinforce"},
    {"last_token": "zero", "gamma": 0.5},
    {"batch_norm": True},
    VERL,
]
forms = pytest.mark.parametrize("options", FORMS, ids=str)


@forms
def test_nothing_comes_from_a_reward_model_that_is_the_reference(options):
    """The first iteration: the process part is exactly 0, the rest is the outcome's credit bit for bit."""
    forest = random_forest(0, "chain", unsampled=0.2)
    forest = forest.with_token(prm_logprobs=forest.token["ref_logprobs"])
    assert run(forest, "prime", "process", **options).abs().max() == 0
    plain = {**options, "whitening": False}
    if options.get("estimator") == "reinforce":
        assert run(forest, "prime", **plain).equal(run(forest, "reward_to_go", baseline="none"))
    else:
        assert run(forest, "prime", **plain).equal(run(forest, "grpo" if "estimator" in options else "rloo"))


@pytest.mark.parametrize("centering", ["paper", "authors"])
def test_the_first_return_is_that_of_the_blog(centering):
    """sum of the centred scores over completion i = T_i (m_i - mean of the other m_j), in both forms."""
    for seed in range(5):
        forest = random_forest(seed, "chain", unsampled=0.2, num_trees=8)
        own, size = mean_score(forest, implicit_rewards(forest, 2.0))
        others, number = of_others(forest, own)
        first = forest.active & (forest.token["position"] == 0) & (number > 0)
        found = run(forest, "prime", "process", beta=2.0, centering=centering)
        close(found[first], (size * (own - others))[first], atol=1e-5, rtol=0)
        assert first.sum() > 2 and found[first].abs().max() > 0.1


def test_the_baseline_is_a_mean_per_token():
    """Not Eq. 5 as printed: completions of one score per token, whatever their lengths, get no process part."""
    forest = group([[1.0] * size for size in (1, 2, 7)])
    assert run(forest, "prime", "process").abs().max() < 1e-6


def test_what_the_authors_centring_adds():
    """(x - m_i) / (K - 1) on each token, so its sum to the end on each advantage, and nothing on the first."""
    forest = random_forest(3, "chain", unsampled=0.2)
    scores = implicit_rewards(forest, 2.0)
    own, _ = mean_score(forest, scores)
    _, number = of_others(forest, own)
    extra = torch.where(forest.active & (number > 0), (scores - own) / number.clamp(min=1), 0.0)
    paper, authors = (run(forest, "prime", beta=2.0, centering=form) for form in ("paper", "authors"))
    close(authors - paper, sum_to_end(forest, extra) * forest.active, atol=1e-5, rtol=0)
    first = forest.token["position"] == 0
    assert (authors - paper)[first & forest.active].abs().max() < 1e-5 < 0.1 < (authors - paper).abs().max()


def test_a_common_weight_is_whitened_away():
    """Twice both coefficients; unequal ones count."""
    forest = random_forest(4, "chain")
    once, twice, other = (
        run(forest, "prime", beta=1.0, whitening=True, outcome_coef=a, process_coef=b)
        for a, b in [(1.0, 1.0), (2.0, 2.0), (2.0, 1.0)]
    )
    close(twice, once, atol=1e-5, rtol=1e-5)
    assert (other - once).abs().max() > 0.05


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce"])
def test_batch_norm_takes_beta_away(estimator):
    """And without it the process part is as large as beta, but for GRPO's, which divides by the std."""
    forest = random_forest(5, "chain")
    small, large = (run(forest, "prime", beta=beta, estimator=estimator, batch_norm=True) for beta in (0.05, 3.0))
    close(small, large, atol=1e-4, rtol=1e-4)
    small, large = (run(forest, "prime", "process", beta=beta, estimator=estimator) for beta in (0.5, 1.5))
    close(large, small if estimator == "grpo" else 3 * small, atol=1e-4, rtol=1e-4)
    assert small.abs().max() > 0.1


def test_batch_norm_is_of_the_whole_batch():
    """The largest return of any group, discount or not, is divided by; each group's own would be another number."""
    prm, ref = [[[1.0, 1.0], [2.0]], [[-8.0], [0.0]]], [[[0.0, 0.0], [0.0]], [[0.0], [0.0]]]
    forest = flat_forest([[2, 1], [1, 1]], [[0.0, 0.0]] * 2, prm_logprobs=prm, ref_logprobs=ref)
    wanted = [x / 8 for x in (-2, -1, 1, -8, 8)]
    is_near(run(forest, "prime", batch_norm=True), wanted)
    is_near(run(forest, "prime", batch_norm=True, gamma=0.5), [x / 8 for x in (-1.5, -1, 1, -8, 8)])


def test_whitened_over_all_judged_tokens():
    """Mean 0 and variance 1 over sampled tokens of judged completions; the rest stays 0; the parts keep their ratio."""
    forest = random_forest(6, "chain", unsampled=0.3)
    assert 0 < forest.active.sum() < forest.num_tokens - 5
    found = run(forest, "prime", beta=1.0, whitening=True)
    counted = found[forest.active]
    assert float(counted.mean()) == pytest.approx(0, abs=1e-6) and float(counted.var()) == pytest.approx(1, abs=1e-5)
    assert found[~forest.active].abs().max() == 0
    spread = run(forest, "prime", beta=1.0)[forest.active].std()
    process = run(forest, "prime", "process", beta=1.0, whitening=True)
    close(process * spread, run(forest, "prime", "process", beta=1.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce"])
@pytest.mark.parametrize("last_token", ["keep", "zero"])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
def test_both_parts_equal_the_reference(estimator, last_token, batch_norm, gamma):
    """Options together, on completions of several segments with tool turns and token rewards."""
    options = {"estimator": estimator, "last_token": last_token, "batch_norm": batch_norm, "gamma": gamma, "beta": 2.0}
    for seed in range(3):
        trees = random_trees(seed, "chain", unsampled=0.2, columns=(*LOGPROBS, "token_rewards"))
        for tree in trees:
            judge_only_sampled(tree)
        forest = Forest.from_trees(trees)
        for name, column in (("prime", "advantages"), ("prime_process", "process")):
            expected = torch.tensor(reference_credit.advantages(name, trees, **options))
            close(run(forest, "prime", column, **options), expected, atol=5e-5, rtol=5e-5)
            assert expected.abs().max() > 0.1


# ---------------------------------------------------------------------- degenerate groups


def test_equal_outcomes_leave_the_process_part():
    """The outcome part is exactly 0, 0.1 and 0.7 too; only a reward model that is the reference leaves nothing."""
    for reward in (0.0, 0.1, 0.7, 1.0):
        forest = group(rewards=[reward] * 3)
        assert outcome(forest).abs().max() == 0 and outcome(forest, estimator="grpo").abs().max() == 0
        is_near(run(forest, "prime", beta=0.5), [3, 0.5, -1.5, 0, 0, -1, -3])


def test_equal_means_say_nothing_under_grpo():
    """The std of means 1, 1, 1 is 0: no division by its epsilon. Under RLOO tokens still differ."""
    forest = group([[3, -1], [1], [0, 1, 2]])
    assert run(forest, "prime", "process", beta=0.5, estimator="grpo").abs().max() == 0
    is_near(run(forest, "prime", "process", beta=0.5), [0.0, -2, 0, 0, 1, 1])
    thirds = group([[0.1] * size for size in (1, 3, 6, 7)], [1.0, 0.0, 0.0, 1.0], beta=0.05)  # means that round
    assert run(thirds, "prime", "process", estimator="grpo").abs().max() == 0


@forms
def test_a_singleton_gets_nothing(options):
    """A lone completion, and one whose fellows are unjudged: both parts 0, but under REINFORCE, which compares none."""
    alone = [Segment([1, 2], reward=1.0), Segment([3, 4]), Segment([5])]
    others = [Segment([1, 2], reward=0.0), Segment([3], reward=1.0), Segment([3, 4], reward=1.0)]
    trees = [Tree(Problem(id=str(i)), [1], s) for i, s in enumerate([alone, alone[:1], others])]
    forest = Forest.from_trees(trees)
    prm = torch.linspace(-2, 1, forest.num_tokens)
    forest = forest.with_token(prm_logprobs=prm, ref_logprobs=0.5 * prm.square())
    options = {**options, "whitening": False}
    single = (forest.token_tree < 2) & forest.active
    for part in (outcome(forest, **options), run(forest, "prime", "process", **options)):
        assert part[forest.token_tree == 2].abs().max() > 0.01
        assert (part[single].abs().min() > 0.01) == (options.get("estimator") == "reinforce")
        assert part[single].abs().max() == 0 or options.get("estimator") == "reinforce"
        assert part[~forest.active].abs().max() == 0


@forms
def test_what_is_unjudged_is_in_no_mean(options):
    """Nor in the largest return of the batch, nor in the mean and variance that whiten."""
    trees = random_trees(2, "chain", unjudged=0.0)
    before = run(Forest.from_trees(trees), "prime", **options)
    for tree in trees:
        tree.segments.append(Segment([1] * 3, columns={"prm_logprobs": [50.0] * 3, "ref_logprobs": [-50.0] * 3}))
        tree.segments[-1].columns |= dict.fromkeys(("old_logprobs", *STEPS), [0.0] * 3)
    forest = Forest.from_trees(trees)
    after, judged = run(forest, "prime", **options), forest.judged[forest.token["segment"]]
    close(after[judged], before, atol=1e-6, rtol=1e-6)
    assert after[~judged].abs().max() == 0 and before.abs().max() > 0.1


def tool_forest(tools: bool) -> Forest:
    """`group()`, with a tool's turn within the last completion and another at its end, or without."""

    def segment(ids: list[int], scores: list[float], **rest) -> Segment:
        columns = {"prm_logprobs": [2.0 * x for x in scores], "ref_logprobs": [0.0] * len(scores)}
        return Segment(ids, columns=columns, **rest)

    segments = [segment([1, 2], SCORES[0], reward=1.0), segment([3], SCORES[1], reward=0.0)]
    if not tools:
        segments.append(segment([4, 5, 6, 7], SCORES[2], reward=0.0))
        return Forest.from_trees([Tree(Problem(), [1], segments)])
    segments += [
        segment([4], SCORES[2][:1]),
        segment([90, 91], [100, -7], parent=2, sampled=False),
        segment([5, 6, 7], SCORES[2][1:], parent=3),
        segment([92, 93], [50, 50], parent=4, sampled=False, reward=0.0),
    ]
    return Forest.from_trees([Tree(Problem(), [1], segments)])


@forms
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_tool_tokens_do_not_count(options, gamma):
    """They carry no score and no advantage, are not in T, are not the last token and do not fade what follows."""
    options = {"beta": 0.5, **options, "gamma": gamma}
    plain, tools = tool_forest(False), tool_forest(True)
    found = run(tools, "prime", **options)
    assert found[~tools.token_sampled].abs().max() == 0 and (~tools.token_sampled).sum() == 4
    close(found[tools.token_sampled], run(plain, "prime", **options), atol=1e-6, rtol=1e-6)


def test_a_completion_without_a_sampled_token_has_no_mean_score():
    """A prefilled answer is judged, and in the outcome's baseline; the process baseline has the two others."""
    forest = tool_forest(False)
    segments = [Segment([9], reward=1.0, sampled=False), *forest.to_trees()[0].segments]
    more = Forest.from_trees([Tree(Problem(), [1], segments)])
    found = run(more, "prime", "process", beta=0.5)
    assert found[0] == 0
    close(found[1:], run(forest, "prime", "process", beta=0.5))
    is_near(outcome(more, beta=0.5), [0, *[2 / 3] * 2, *[-2 / 3] * 5])


# ---------------------------------------------------------------------- options and files


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 0.0}, r"credit\.beta must be above 0, got 0\.0"),
        ({"beta": -1.0}, r"credit\.beta must be above 0, got -1\.0"),
        ({"gamma": 1.5}, r"credit\.gamma must lie in \[0, 1\], got 1\.5"),
        ({"estimator": "grpo", "centering": "authors"}, r"credit\.centering: authors .* estimator rloo, not of grpo"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_named(options, message):
    with pytest.raises(UserError, match=message):
        run(group(), "prime", **options)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--credit.beta 0", "credit.beta must be above 0"),
        ("--credit.gamma 2", "credit.gamma must lie in [0, 1]"),
        ("--credit.centering authors --credit.estimator grpo", "a form of estimator rloo, not of grpo"),
        ("--credit.name treerpo --growth.name tree --credit.tau -1", "credit.tau must not be negative"),
        ("--credit.name my_credit.fussy --credit.size 3", "size 3 is odd"),
    ],
)
def test_wrong_values_are_named_before_a_token_is_sampled(tmp_path, monkeypatch, capsys, words, message):
    """Those of a user's function too."""
    write_credits(tmp_path, monkeypatch)
    monkeypatch.setattr("stepcredit.samplers.transformers.TransformersSampler.sample", None)
    options = {} if "--credit.name" in words else {"--algorithm": "prime"}
    assert main(["train", *[w for pair in options.items() for w in pair], *words.split(), "--run-dir", "run"]) == 2
    assert message in capsys.readouterr().err and not Path("run").exists()


@pytest.mark.parametrize("name", [*CREDIT, "my_credit.fussy", "my_credit.picky"])
def test_the_trial_call_stops_nothing_else(tmp_path, monkeypatch, name):
    """All functions with their defaults, and one that takes only what no made-up rollouts have."""
    write_credits(tmp_path, monkeypatch)
    function, _ = build_credit(CreditConfig(name=name))
    assert callable(function)


@pytest.mark.parametrize(
    "credit, beta", [({}, 1.5), ({"beta": 0.3}, 0.3), ({"name": "grpo"}, 0.05), ({"name": "prime"}, 0.05)]
)
def test_the_reward_model_has_the_scale_of_the_credit(tmp_path, monkeypatch, credit, beta):
    """Where it is not given it is the function's own default."""
    write_credits(tmp_path, monkeypatch)
    config = Config(credit=CreditConfig(**{"name": "my_credit.fussy"} | credit))
    assert prm_beta(config) == beta


def write_credits(folder: Path, monkeypatch) -> None:
    """A module beside the config, with a function that has limits and one that looks at the rows of the data."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_credit", raising=False)
    Path("my_credit.py").write_text(
        "import torch\n"
        "from stepcredit.errors import UserError\n"
        "def fussy(forest, beta: float = 1.5, size: int = 2):\n"
        "    if size % 2:\n"
        "        raise UserError(f'size {size} is odd')\n"
        "    return torch.zeros(forest.num_tokens)\n"
        "def picky(forest):\n"
        "    return torch.ones(forest.num_tokens) * forest.problems[0].columns['level']\n"
    )


def test_the_result_is_finite_where_all_scores_are_huge():
    """Log-ratios of 100 nats a token over long completions."""
    forest = group([[50.0] * 300, [-50.0] * 200, [0.0]])
    for options in FORMS:
        assert assign(forest, "prime", CREDIT["prime"], options).token["advantages"].isfinite().all()


def test_an_empty_forest_is_no_error():
    """As for the other credit functions."""
    columns = dict.fromkeys(("prm_logprobs", "ref_logprobs"), torch.zeros(0))
    for options in FORMS:
        assert run(Forest.from_trees([]).with_token(**columns), "prime", **options).shape == (0,)


def write_records(path: Path, *absent: str) -> None:
    segments = [
        {"token_ids": [5] * len(row), "reward": reward, "ref_logprobs": [-1.0] * len(row),
         "prm_logprobs": [20 * x - 1.0 for x in row], "note": "mine"}
        for row, reward in zip(SCORES, REWARDS, strict=True)
    ]  # fmt: skip
    kept = [{key: value for key, value in segment.items() if key not in absent} for segment in segments]
    path.write_text(json.dumps({"id": "a", "segments": kept}) + "\n")


@pytest.mark.parametrize("options, expected", [([], [3, 0.5, -1.5, 0, 0, -1, -3]),
                                               (["--credit.centering", "authors"], [3, 0, -1.5, 0, 0, -1.5, -4.5]),
                                               (["--credit.gamma", "0.5"], [2.75, 0.5, -1.5, 0.625, 1.25, 0.5, -3]),
                                               (["--credit.beta", "0.1"], [6, 1, -3, 0, 0, -2, -6])])  # fmt: skip
def test_through_the_command_line(tmp_path, monkeypatch, capsys, options, expected):
    """beta is 0.05 by default; both parts stand in the file, beside what stood there."""
    monkeypatch.chdir(tmp_path)
    write_records(Path("f.jsonl"))
    assert main(["credit", "--in", "f.jsonl", "--out", "g.jsonl", "--credit.name", "prime", *options]) == 0
    segments = json.loads(Path("g.jsonl").read_text())["segments"]
    assert [x for s in segments for x in s["process"]] == pytest.approx(expected, abs=1e-5)
    outcomes = [x - y for s in segments for x, y in zip(s["advantages"], s["process"], strict=True)]
    assert outcomes == pytest.approx([1, 1, *[-0.5] * 5], abs=1e-5)
    assert all(segment["note"] == "mine" and "weights" in segment for segment in segments)
    assert "prime: 1 trees, 3 segments, 7 tokens -> g.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("words, absent, parts", [
    ([], ["prm_logprobs"], ["f.jsonl", "no segment has 'prm_logprobs'", "ref_logprobs"]),
    ([], ["ref_logprobs"], ["f.jsonl", "no segment has 'ref_logprobs'"]),
    ([], ["prm_logprobs", "ref_logprobs"], ["f.jsonl", "prm_logprobs", "none"]),
    (["--credit.estimator", "ppo"], [], ["credit.estimator", "rloo, grpo, reinforce"]),
    (["--credit.beta", "0"], [], ["credit.beta must be above 0"]),
    (["--credit.whitening", "1"], [], ["credit.whitening", "bool"]),
])  # fmt: skip
def test_errors_through_the_command_line(tmp_path, monkeypatch, capsys, words, absent, parts):
    """One line, and no file."""
    monkeypatch.chdir(tmp_path)
    write_records(Path("f.jsonl"), *absent)
    assert main(["credit", "--in", "f.jsonl", "--out", "g.jsonl", "--credit.name", "prime", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and [part for part in parts if part not in error] == []
    assert not Path("g.jsonl").exists()
