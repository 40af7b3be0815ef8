"""Sums of credits: vectors by hand, the credit that they reproduce, normalisation, trees, and runs with one."""

import json
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from builders import (
    LOGPROBS,
    STEPS,
    VARIANTS,
    VERL,
    flat_forest,
    is_near,
    judge_only_sampled,
    random_forest,
    random_trees,
    run,
    variants,
    with_baselines,
)
from ranks_of import run_on
from ranks_of import same_metrics as same_run_metrics
from safetensors.torch import load_file
from torch import Tensor

from stepcredit.cli.main import main
from stepcredit.config import Config, CreditConfig, dump_yaml, read_yaml, resolve
from stepcredit.credit import assign, needs_of
from stepcredit.credit.base import judged_tokens
from stepcredit.credit.choose import build_credit, credit_of
from stepcredit.credit.normalize import completion_shares, normalized
from stepcredit.errors import UserError
from stepcredit.estimators.prm import prm_beta
from stepcredit.estimators.reads import models_beside
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.run.build import build_parts
from stepcredit.run.checkpoint import newest_checkpoint

close = torch.testing.assert_close


def summed(forest: Forest, *terms: dict | str, **options) -> Forest:
    """The forest with the columns that the sum of these terms adds."""
    _, assign = build_credit(CreditConfig.model_validate({"sum": list(terms), **options}))
    return assign(forest)


def one(name: str, options: dict, **how) -> dict:
    """A term with all that a function is given, whatever that is called."""
    return {"name": name, "options": options, **how}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own: credit that is a column of the rollouts, and the same as a process part."""
    code = """
from stepcredit.credit.base import CreditParts, credit
import torch
@credit("entropy", forests="tree")
def column(forest, weight=1.0):
    return weight * forest.token["entropy"]
@credit("entropy", forests="tree")
def process(forest):
    return CreditParts(torch.zeros(forest.num_tokens), forest.token["entropy"])
def wrong(forest):
    return torch.zeros(3)
"""
    (tmp_path / "own_credit.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_credit", None)


# ---------------------------------------------------------------------- by hand

ELL = [[0.2, -0.1, 0.4], [0.0, 0.3], [-0.2, 0.1, 0.1, 0.5]]
MSA = [0.010, 0, 0.0125, 0, 0.010, -0.010, -0.010, -0.0125, 0]  # SPRO's at beta 0.05
Z = [0.57735] * 3 + [-1.15470] * 2 + [0.57735] * 4


def paper_group() -> Forest:
    """The group of the notes on SPRO: rewards 1, 0, 1."""
    ref = [[-1.0 - index] * len(row) for index, row in enumerate(ELL)]
    old = [[x - 1.0 - index for x in row] for index, row in enumerate(ELL)]
    return flat_forest([[3, 2, 4]], [[1.0, 0.0, 1.0]], old_logprobs=[old], ref_logprobs=[ref])


def test_outcome_credit_by_hand():
    """RLOO 1, -1/2, -1/2 and half of Dr. GRPO's 2/3, -1/3, -1/3; less it with the other sign."""
    forest = flat_forest([[1, 2, 1]], [[1.0, 0.0, 0.0]])
    given = summed(forest, "rloo", {"name": "dr_grpo", "weight": 0.5})
    is_near(given.token["advantages"], [4 / 3] + [-2 / 3] * 3, 1e-6)
    assert "process" not in given.token
    given = summed(forest, "rloo", {"name": "dr_grpo", "weight": -1})
    is_near(given.token["advantages"], [1 / 3] + [-1 / 6] * 3, 1e-6)


def test_a_process_part_by_hand():
    """Half of SPRO's process part beside GRPO's: parts and terms stand in their columns."""
    given = summed(paper_group(), "grpo", {"name": "spro", "part": "process", "weight": 0.5})
    is_near(given.token["process"], [0.5 * x for x in MSA], 1e-6)
    is_near(given.token["advantages"], [z + 0.5 * x for z, x in zip(Z, MSA, strict=True)])
    is_near(given.token["term/grpo"], Z)
    assert given.token["term/spro.process"].equal(given.token["process"])


NORMALIZED = [
    # means of the completions 3 and 1/2; (5/4)^2 and the mean of (7/4)^2 and (3/4)^2 are 3.375 for n - 1 = 1
    ("group", [1.25, -1.75, -0.75], 3.375**0.5),
    # the mean of three tokens is 4/3; (25 + 16 + 1) / 9 / 2
    ("batch", [5 / 3, -4 / 3, -1 / 3], (7 / 3) ** 0.5),
    ("none", [3.0, 0.0, 1.0], 1.0),
]


@pytest.mark.parametrize("how, centred, std", NORMALIZED)
def test_normalisation_by_hand(how, centred, std):
    """Completions of one and two tokens with credit 3 and 0, 1; unsampled and unjudged tokens count nowhere."""
    segments = [Segment([1], reward=1.0), Segment([2, 3], reward=0.0), Segment([4, 5])]
    segments += [Segment([6], parent=1, sampled=False, reward=0.0)]
    segments[1].reward = None
    forest = Forest.from_trees([Tree(Problem(), [1], segments)])
    values = torch.tensor([3.0, 0.0, 1.0, 99.0, float("nan"), 7.0])
    where = judged_tokens(forest)
    assert where.tolist() == [True] * 3 + [False] * 3
    found, _, _ = normalized(forest, values, None, how, where)
    is_near(found[:3], [x / std for x in centred])
    if how != "none":
        assert found[3:].tolist() == [0, 0, 0]


def test_a_shared_token_counts_in_every_completion_through_it():
    """A step worth 1 and its two ends worth 2 and -2: mean (3/2 - 1/2) / 2, variance (1/4 + 9/4 + 1/4 + 25/4) / 2."""
    segments = [Segment([1]), Segment([2], parent=0, reward=1.0), Segment([3], parent=0, reward=0.0)]
    forest = Forest.from_trees([Tree(Problem(), [1], segments)])
    share, count = completion_shares(forest, judged_tokens(forest))
    assert share.tolist() == [1.0, 0.5, 0.5] and count.tolist() == [2.0]
    found, _, _ = normalized(forest, torch.tensor([1.0, 2.0, -2.0]), None, "group", judged_tokens(forest))
    is_near(found, [0.5 / 4.5**0.5, 1.5 / 4.5**0.5, -2.5 / 4.5**0.5])


def test_each_normalisation_has_its_place():
    """Of a term before its weight, of the sum after its terms; a group of one completion and equal values become 0."""
    forest = flat_forest([[1, 2], [2, 1], [1]], [[1.0, 0.0], [0.5, 0.5], [1.0]])
    term = summed(forest, {"name": "dr_grpo", "weight": 3, "normalize": "group"}).token["advantages"]
    is_near(term, [3 / 2**0.5] + [-3 / 2**0.5] * 2 + [0] * 4, 1e-5)
    whole = summed(forest, {"name": "dr_grpo", "weight": 3}, normalize="group").token["advantages"]
    is_near(whole, [1 / 2**0.5] + [-1 / 2**0.5] * 2 + [0] * 4, 1e-5)


# ---------------------------------------------------------------------- what a sum reproduces


def forest_for(name: str, seed: int) -> Forest:
    trees = random_trees(seed, "deep" if name in ("treerpo", "spo_tree") else "chain", unsampled=0.2)
    for tree in trees:
        for segment in tree.segments:
            segment.reward = None if segment.reward is None else min(1.0, max(0.0, segment.reward))
    return with_baselines(Forest.from_trees(trees))


@variants
def test_a_single_term_of_weight_one_is_that_credit_to_the_bit(name, options):
    for seed in range(3):
        forest = forest_for(name, seed)
        alone = assign(forest, name, needs_function(name), options)
        given = summed(forest, one(name, options))
        for column in ("advantages", "process"):
            assert (column in alone.token) == (column in given.token)
            assert column not in alone.token or given.token[column].equal(alone.token[column])
        for column in ("value", "kept"):
            assert (column in alone.segment) == (column in given.segment)
            assert column not in alone.segment or given.segment[column].equal(alone.segment[column])


def needs_function(name: str):
    return credit_of(CreditConfig(name=name))


@variants
def test_terms_of_weight_zero_add_nothing(name, options):
    other = "spo_tree" if name in ("treerpo", "spo_tree") else "grpo"
    for seed in range(3):
        forest = forest_for(name, seed)
        alone = assign(forest, name, needs_function(name), options)
        given = summed(forest, one(other, {}, weight=0), one(name, options))
        assert given.token["advantages"].equal(alone.token["advantages"])
        assert "kept" not in alone.segment or given.segment["kept"].equal(alone.segment["kept"])
        nothing = summed(forest, one(name, options, weight=0))
        assert nothing.token["advantages"].abs().max() == 0 and "kept" not in nothing.segment


PRIMES = [options for name, options in VARIANTS if name == "prime" and not options.get("whitening")]


@pytest.mark.parametrize("options", [*PRIMES, {"process_coef": 0.3}, {"process_coef": 2.0, "outcome_coef": 0.7}])
def test_rloo_and_the_process_part_of_prime_are_prime(options):
    """To the bit, with the coefficients as weights; with its other estimators GRPO stands in for RLOO."""
    own = {key: value for key, value in options.items() if key not in ("outcome_coef", "process_coef")}
    outcome, process = options.get("outcome_coef", 1.0), options.get("process_coef", 1.0)
    base = {"grpo": "grpo", "reinforce": "reward_to_go"}.get(options.get("estimator", ""), "rloo")
    first = {"name": base, "weight": outcome} | ({"baseline": "none"} if base == "reward_to_go" else {})
    for seed in range(4):
        forest = random_forest(seed, "chain", unsampled=0.2)
        given = summed(forest, first, {"name": "prime", "part": "process", "weight": process, **own})
        for column in ("advantages", "process"):
            assert given.token[column].equal(run(forest, "prime", column, **options)), (seed, column)


def test_a_sum_that_is_normalised_over_the_batch_is_prime_with_whitening():
    """That of verl's recipe too, with 5 and 5; the mean is taken from the outcome part there as here."""
    for options in ({"whitening": True}, {"beta": 1.0, "outcome_coef": 5.0, "process_coef": 5.0, **VERL}):
        own = {key: value for key, value in options.items() if not key.endswith("_coef") and key != "whitening"}
        weight = options.get("process_coef", 1.0)
        for seed in range(4):
            forest = random_forest(seed, "chain", unsampled=0.2)
            terms = {"name": "rloo", "weight": weight}, {"name": "prime", "part": "process", "weight": weight, **own}
            given = summed(forest, *terms, normalize="batch")
            for column in ("advantages", "process"):
                close(given.token[column], run(forest, "prime", column, **options), atol=1e-6, rtol=1e-6)


SPROS = [options for name, options in VARIANTS if name == "spro"]


@pytest.mark.parametrize("options", SPROS)
def test_grpo_and_the_process_part_of_spro_are_spro(options):
    """Eq. 13 is that sum; the port that whitens the process part is the term normalised over the batch."""
    own = {key: value for key, value in options.items() if key != "normalize"}
    for seed in range(4):
        forest = random_forest(seed, "chain", unsampled=0.2)
        how = {"normalize": options.get("normalize", "none")}
        given = summed(forest, "grpo", {"name": "spro", "part": "process", **own, **how})
        for column in ("advantages", "process"):
            assert given.token[column].equal(run(forest, "spro", column, **options)), (seed, column)


def test_dr_grpo_normalised_is_grpo_and_reinforce_pp_baseline():
    """Within groups as GRPO's z-score of completions; over the batch as REINFORCE++ whitens tokens."""
    for seed in range(6):
        trees = random_trees(seed, "chain", unsampled=0.2)
        for tree in trees:
            judge_only_sampled(tree)
        forest = Forest.from_trees(trees)
        by_group = summed(forest, {"name": "dr_grpo", "normalize": "group"}).token["advantages"]
        close(by_group, run(forest, "grpo"), atol=1e-5, rtol=1e-5)
        by_batch = summed(forest, {"name": "dr_grpo", "normalize": "batch"}).token["advantages"]
        assert by_batch.equal(run(forest, "reinforce_pp_baseline"))


def test_advantages_of_steps_are_added_and_do_not_telescope(own):
    """Rewarding Progress: V_{s+1} - V_s as rewards sum to r - V_0 from the first token on; as advantages they stay."""
    steps = [[0.25, 0.5], [-0.25, -0.25]]  # from V_0 = 1/4 to the outcomes 1 and, by way of 0, to 0 less 1/4
    rewards = [[1.0, 0.0]]
    forest = flat_forest([[2, 2]], rewards, entropy=[steps])
    given = summed(forest, "rloo", {"name": "own_credit.column", "weight": 3})
    is_near(given.token["advantages"], [1 + 0.75, 1 + 1.5, -1 - 0.75, -1 - 0.75], 1e-6)
    as_rewards = flat_forest([[2, 2]], rewards, token_rewards=[steps])
    telescoped = run(as_rewards, "reward_to_go", baseline="none")
    is_near(telescoped, [1.75, 1.5, -0.5, -0.25], 1e-6)


# ---------------------------------------------------------------------- what a sum keeps

MIX = (
    {"name": "rloo", "normalize": "group"},
    {"name": "spro", "part": "process", "weight": 0.5, "beta": 2.0, "normalize": "group"},
    {"name": "prime", "weight": 0.25, "beta": 1.0, "normalize": "batch"},
)


@pytest.mark.parametrize("normalize", ["none", "batch", "group"])
def test_the_order_of_completions_groups_and_terms_means_nothing(normalize):
    random, trees = Random(1), random_trees(5, "flat", num_trees=6)
    orders = [random.sample(range(len(tree.segments)), len(tree.segments)) for tree in trees]
    mixed = [
        Tree(tree.problem, tree.prompt_ids, [tree.segments[index] for index in order])
        for tree, order in zip(trees, orders, strict=True)
    ][::-1]
    plain = summed(Forest.from_trees(trees), *MIX, normalize=normalize).to_trees()
    moved = summed(Forest.from_trees(mixed), *MIX[::-1], normalize=normalize).to_trees()[::-1]
    for before, after, order in zip(plain, moved, orders, strict=True):
        for place, origin in enumerate(order):
            for column in ("advantages", "process"):
                found = after.segments[place].columns[column]
                assert found == pytest.approx(before.segments[origin].columns[column], abs=1e-5)


@pytest.mark.parametrize("normalize", ["none", "batch", "group"])
def test_terms_add_up_and_tokens_that_do_not_count_get_nothing(normalize):
    """Undefined numbers of unjudged completions reach no other; the terms are the advantage, but for the sum's mean."""
    trees = random_trees(2, "chain", unjudged=0.0, unsampled=0.3)
    before = summed(Forest.from_trees(trees), *MIX, normalize=normalize).token["advantages"]
    for tree in trees:
        tree.segments.append(Segment([1] * 9, columns=dict.fromkeys((*LOGPROBS, *STEPS), [float("nan")] * 9)))
    forest = summed(Forest.from_trees(trees), *MIX, normalize=normalize)
    judged = judged_tokens(forest)
    advantages, terms = forest.token["advantages"], [v for k, v in forest.token.items() if k.startswith("term/")]
    assert len(terms) == 3 and advantages[~judged].abs().max() == 0
    is_near(advantages[forest.judged[forest.token["segment"]]], before.tolist(), 1e-5)
    left = advantages - sum(terms)
    if normalize == "none":
        is_near(left, [0.0] * len(left), 1e-5)
    for tree in range(forest.num_trees):
        rows = judged & (forest.token_tree == tree)
        assert float(left[rows].max() - left[rows].min()) < 1e-5


def test_a_normalised_part_has_its_moments():
    """Over the batch mean 0 and std 1 of tokens; within a group of completions, each with the same weight."""
    forest = random_forest(3, "flat", num_trees=8, unjudged=0.0)
    term = {"name": "spro", "part": "process", "beta": 3.0}
    values = summed(forest, {**term, "normalize": "batch"}).token["process"]
    assert float(values.mean()) == pytest.approx(0, abs=1e-5) and float(values.std()) == pytest.approx(1, abs=1e-3)
    values = summed(forest, {**term, "normalize": "group"}).token["process"].double()
    share, count = completion_shares(forest, judged_tokens(forest))
    seen = 0
    for tree in range(forest.num_trees):
        rows = forest.token_tree == tree
        if values[rows].abs().max() > 0:
            seen += 1
            mean = float((share * values)[rows].sum() / count[tree])
            variance = float((share * (values - mean).square())[rows].sum() / (count[tree] - 1))
            assert mean == pytest.approx(0, abs=1e-6) and variance == pytest.approx(1, abs=1e-3)
    assert seen >= 4


# ---------------------------------------------------------------------- trees


def branching() -> Forest:
    """Leaves .49, .51 below one step and 0, 1 below the other: TreeRPO prunes the first pair, SPO neither."""
    leaves = [0.49, 0.51, 0.0, 1.0]
    segments = [Segment([1]), Segment([2, 3])]
    segments += [Segment([4 + number], parent=number // 2, reward=reward) for number, reward in enumerate(leaves)]
    return Forest.from_trees([Tree(Problem(id="t"), [1, 2], segments)])


def test_a_segment_is_pruned_if_all_terms_prune_it():
    forest = branching()
    tree, spo = (assign(forest, name, needs_function(name), {}) for name in ("treerpo", "spo_tree"))
    assert tree.segment["kept"].tolist() == [False] * 4 + [True] * 2  # the two steps are worth 1/2 each
    assert spo.segment["kept"].tolist() == [False] * 2 + [True] * 4
    both = summed(forest, "treerpo", {"name": "spo_tree", "weight": 2})
    assert both.segment["kept"].tolist() == [False] * 2 + [True] * 4
    assert both.segment["value"].equal(tree.segment["value"])
    # TreeRPO's -0.04 and 0.04 are noise that it prunes, so they stay out
    is_near(both.token["advantages"][3:], [-0.02, 0.02, -2 - 1, 2 + 1], 1e-4)
    only = summed(forest, "treerpo", {"name": "spo_tree", "weight": 0})
    assert only.segment["kept"].equal(tree.segment["kept"])
    assert only.token["advantages"].equal(tree.token["advantages"])


def test_pruned_segments_are_in_no_mean():
    """Of the whole tree SPO keeps the four leaves: -.01, .01, -.5, .5, each half of its completion's kept tokens."""
    given = summed(branching(), {"name": "spo_tree", "normalize": "group"})
    values = torch.tensor([-0.01, 0.01, -0.5, 0.5])
    is_near(given.token["advantages"], [0, 0, 0, *(values / values.std()).tolist()], 1e-4)


def test_a_term_for_flat_forests_alone_is_named(tmp_path):
    with pytest.raises(UserError, match=r"credit.sum\[1\] 'grpo' takes flat forests.*tree 't' branches"):
        summed(branching(), "treerpo", "grpo")
    config = resolve({"algorithm": "treerpo", "credit": {"sum": ["spo_tree", "rloo"]}})
    with pytest.raises(UserError, match=r"credit.sum\[1\] 'rloo' takes flat forests, growth.name is tree"):
        build_parts(config)
    assert needs_of(credit_of(CreditConfig(sum=["treerpo", "spo_tree"]))).forests == "tree"


# ---------------------------------------------------------------------- config and errors


def test_columns_are_those_of_all_terms():
    """And what adds them is built: PRIME's reward model and SPRO's reference for a sum of the two."""
    config = resolve({"credit": {"sum": ["grpo", {"name": "spro"}, {"name": "prime", "part": "process"}]}})
    function = credit_of(config.credit)
    assert set(needs_of(function).columns) == {"old_logprobs", "ref_logprobs", "prm_logprobs"}
    assert "reward model" in [load.name for load in models_beside(config)]
    forest = random_forest(0).without_token("prm_logprobs")
    with pytest.raises(UserError, match=r"credit.sum\[2\] 'prime' needs the column 'prm_logprobs'"):
        assign(forest, "sum", function, {})


def test_the_reward_model_has_the_beta_of_the_term_that_reads_it():
    """SPRO's is another thing; two that differ cannot both hold."""
    spro, prime = {"name": "spro", "beta": 0.7}, {"name": "prime", "part": "process", "beta": 0.2}
    assert prm_beta(Config(credit=CreditConfig(sum=[spro, prime]))) == 0.2
    assert prm_beta(Config(credit=CreditConfig(sum=["rloo", "prime"]))) == 0.05
    with pytest.raises(UserError, match=r"credit.sum\[0\].beta 0.2, credit.sum\[1\].beta 0.05: .* one beta"):
        build_parts(resolve({"credit": {"sum": [prime, "prime"]}}))


def test_a_sum_in_files_and_on_the_command_line_is_read_back(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "algorithm: spro\ncredit:\n  normalize: batch\n  sum:\n    - grpo\n"
        "    - {name: spro, part: process, weight: 1e-1, normalize: none, beta: 1e-3}\n"
    )
    config = resolve(read_yaml(str(tmp_path / "run.yaml")))
    assert config.credit.name == "sum" and config.credit.label == "(grpo + 0.1 spro.process) by batch"
    assert config.credit.model_dump() == {
        "name": "sum",
        "sum": [{"name": "grpo"}, {"name": "spro", "part": "process", "weight": 0.1, "beta": 0.001}],
        "normalize": "batch",
    }
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert resolve(read_yaml(str(tmp_path / "config.yaml"))) == config


def test_names_of_terms_are_expanded_and_may_be_code_of_your_own(own, monkeypatch, tmp_path):
    """A dotted path, a file below the home folder; options that a term has too go into `options`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = resolve({"credit": {"sum": [{"name": "~/own_credit.py:process"}, {"name": "own_credit.column"}]}})
    assert config.credit.sum[0].name == f"{tmp_path}/own_credit.py:process"
    forest = flat_forest([[1, 1]], [[1.0, 0.0]], entropy=[[[2.0], [5.0]]])
    given = summed(
        forest, "./own_credit.py:process", {"name": "own_credit.column", "weight": 10, "options": {"weight": 3.0}}
    )
    is_near(given.token["advantages"], [62.0, 155.0])
    is_near(given.token["process"], [2.0, 5.0])
    assert [name for name in given.token if name.startswith("term/")] == ["term/process", "term/column"]
    given = summed(forest, "own_credit.column", "own_credit.column")
    assert [name for name in given.token if name.startswith("term/")] == ["term/column[0]", "term/column[1]"]


def test_an_option_of_the_term_that_the_function_has_too_is_said(own, caplog):
    build_credit(CreditConfig(sum=[{"name": "spro", "part": "process", "normalize": "batch"}]))
    assert "credit.sum[0].normalize is that of the term" in caplog.text
    caplog.clear()
    build_credit(CreditConfig(sum=[{"name": "spro", "options": {"normalize": "batch"}}, "own_credit.column"]))
    assert caplog.text == ""


WRONG = {
    "[]": ["credit.sum", "at least 1"],
    "grpo": ["credit.sum", "list"],
    "[grop]": ["credit.sum[0].name", "'grop'", "did you mean 'grpo'"],
    "[grpo, {name: spro, betta: 1}]": ["credit.sum[1] 'spro'", "no option 'betta'", "did you mean 'beta'"],
    "[grpo, {name: spro, beta: big}]": ["credit.sum[1].beta", "'big'", "float"],
    "[grpo, {name: prime, gamma: 1.5}]": ["credit.sum[1].gamma must lie in [0, 1]"],
    "[grpo, {name: rloo, part: process}]": ["credit.sum[1].part", "'rloo' has no process part"],
    "[grpo, {name: spro, part: proces}]": ["credit.sum[1].part", "did you mean 'process'"],
    "[{name: grpo, weight: much}]": ["credit.sum[0].weight", "number", "'much'"],
    "[{name: grpo, weight: .inf}]": ["credit.sum[0].weight", "finite"],
    "[{name: grpo, normalize: grup}]": ["credit.sum[0].normalize", "did you mean 'group'"],
    "[grpo, {weight: 1}]": ["credit.sum[1].name"],
    "[grpo, 3]": ["credit.sum[1]", "section"],
    "[grpo, {name: sum}]": ["credit.sum[1]", "sum within a sum"],
    "[grpo, {name: spro, beta: 1, options: {beta: 2}}]": ["credit.sum[1]", "beta stands there twice"],
    "[{name: grpo, name: rloo}]": ["credit.sum.0.name stands there already"],
    "[grpo, {name: own_credit.wrong}]": ["credit.sum[1] 'own_credit.wrong'", "(3,)", "tokens"],
    "[grpo] --credit.name rloo": ["credit", "'rloo'", "sum"],
    "[grpo] --credit.beta 1": ["credit 'sum'", "no option 'beta'", "normalize"],
    "[grpo] --credit.normalize grop": ["credit.normalize", "none, batch, group"],
}


@pytest.mark.parametrize("words", WRONG)
def test_errors_name_the_term(words, own, capsys):
    """One line with the term, before anything is read."""
    Path("in.jsonl").write_text(json.dumps(TREE) + "\n")
    given, _, more = words.partition(" --")
    more = f"--{more}".split() if more else []
    assert main(["credit", "--in", "in.jsonl", "--out", "out.jsonl", "--credit.sum", given, *more]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert [piece for piece in WRONG[words] if piece not in error] == [], error
    assert not Path("out.jsonl").exists()


def test_sum_needs_its_terms(capsys):
    assert main(["train", "--credit.name", "sum"]) == 2
    assert "list of its terms" in capsys.readouterr().err


# ---------------------------------------------------------------------- saved rollouts and the report

TREE = {"id": "a", "segments": [{"token_ids": [1, 2], "reward": 1.0}, {"token_ids": [3], "reward": 0.0}]}


def test_credit_of_saved_rollouts_shows_the_terms(own, capsys):
    segments = [
        {"token_ids": [1], "reward": 1.0, "entropy": [0.5]},
        {"token_ids": [2, 3], "reward": 0.0, "entropy": [0, 1]},
    ]
    Path("in.jsonl").write_text(json.dumps({"id": "a", "segments": segments}) + "\n")
    terms = "[rloo, {name: own_credit.process, weight: 2}]"
    assert main(["credit", "--in", "in.jsonl", "--out", "out.jsonl", "--credit.sum", terms]) == 0
    said = capsys.readouterr().out
    assert said.startswith("rloo + 2 process: 1 trees") and "credit/rms/rloo" in said and "credit/rms/process" in said
    first, second = json.loads(Path("out.jsonl").read_text())["segments"]
    assert first["terms"] == {"rloo": [1.0], "process": [1.0]} and first["advantages"] == [2.0]
    assert second["terms"] == {"rloo": [-1.0, -1.0], "process": [0.0, 2.0]} and second["process"] == [0.0, 2.0]
    before = Path("out.jsonl").read_bytes()
    assert main(["credit", "--in", "out.jsonl", "--out", "out.jsonl", "--credit.sum", terms]) == 0
    assert Path("out.jsonl").read_bytes() == before
    assert main(["credit", "--in", "out.jsonl", "--out", "out.jsonl", "--credit.name", "rloo"]) == 0
    assert "terms" not in Path("out.jsonl").read_text()


# ---------------------------------------------------------------------- runs

SMALL = "--train.problems-per-iteration 3 --group-size 4 --num-problems 2 --max-new-tokens 40 --device cpu --seed 3"
COMMON = [*SMALL.split(), "--optim.schedule", "constant", "--rollouts.every", "1", "--checkpoint.keep", "9"]
SPRO = "[grpo, {name: spro, part: process, beta: 0.003}]"
MIXED = "[{name: rloo, normalize: group}, {name: spro, part: process, weight: 0.2, normalize: batch}]"


def train(folder: Path, *words: str) -> Path:
    assert main(["train", *COMMON, "--save-every", "1", "--run-dir", str(folder), *words]) in (0, 1)
    return folder


def weights(run_dir: Path) -> dict[str, Tensor]:
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """SPRO, SPRO written as a sum, and another sum, three iterations each."""
    folder = tmp_path_factory.mktemp("sums")
    train(folder / "spro", "--algorithm", "spro", "--iterations", "3")
    train(folder / "sum", "--algorithm", "spro", "--iterations", "3", "--credit.sum", SPRO)
    train(folder / "mixed", "--iterations", "3", "--credit.sum", MIXED, "--credit.normalize", "batch")
    return folder


def test_training_with_spro_as_a_sum_is_training_with_spro(trained):
    """The same weights to the last bit, and the terms in the metrics and saved rollouts."""
    one, other = weights(trained / "spro"), weights(trained / "sum")
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    start = load_file(Path(sys.modules["stepcredit"].__file__).parent / "demo" / "model" / "model.safetensors")
    assert not all(one[name].equal(start[name].to(one[name].dtype)) for name in one if name in start)
    last = [json.loads((trained / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("spro", "sum")]
    assert last[1].keys() - last[0].keys() == {"credit/rms/grpo", "credit/rms/spro.process"}
    assert last[1]["credit/rms/spro.process"] == last[0]["credit/process_rms"] > 0


def test_a_run_with_a_sum_goes_on_to_the_same_weights(trained, tmp_path):
    run_dir = train(tmp_path / "run", "--iterations", "3", "--credit.sum", MIXED, "--credit.normalize", "batch")
    for name in ("000003", "000002"):
        checkpoint = run_dir / "checkpoints" / name
        for file in sorted(checkpoint.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        checkpoint.rmdir()
    assert main(["train", "--resume", str(run_dir)]) in (0, 1)
    wanted, found = weights(trained / "mixed"), weights(run_dir)
    assert all(wanted[name].equal(found[name]) for name in wanted)


@pytest.mark.slow
def test_two_processes_and_small_micro_batches_give_what_one_gives(tmp_path):
    """Moments over the batch are of all its groups, wherever they are computed.

    SPRO's part has its size here: so small at first, brought to a standard deviation of 1 it would be rounding.
    """
    folders = {1: tmp_path / "one", 2: tmp_path / "two"}
    terms = "[{name: rloo, normalize: group}, {name: dr_grpo, normalize: batch}, {name: spro, part: process}]"
    words = [*COMMON, "--iterations", "3", "--credit.sum", terms, "--credit.normalize", "batch"]
    words += ["--train.problems-per-iteration", "8"]  # some of whose groups have right and wrong completions
    run_on(folders, words)
    cut = tmp_path / "cut"
    run_on({1: cut}, [*words, "--optim.max-tokens-per-micro-batch", "100"])
    for other in (folders[2], cut):
        rows = same_run_metrics(folders[1], other, 1e-5)
        assert rows[-1]["credit/rms/spro.process"] > 0


def test_the_report_has_the_terms_and_sums_to_compare(trained, tmp_path, capsys):
    """The run's own sum comes out again under its formula; a sum that is asked for stands beside it."""
    from stepcredit.display.rollouts import read_groups
    from stepcredit.display.runs import read_runs
    from stepcredit.display.token_texts import token_texts_of
    from stepcredit.report.credits import compare_credits

    (found,) = read_runs([str(trained / "sum")])
    groups = read_groups(found, 3, token_texts_of(found))
    assert {"term/grpo", "term/spro.process"} <= groups[0].columns.keys()
    asked = CreditConfig(sum=["grpo", {"name": "spro", "part": "process", "weight": 2}])
    comparison = compare_credits(found, groups, ["sum", "grpo", asked])
    assert list(comparison.scores) == ["grpo + spro.process", "grpo", "grpo + 2 spro.process"]
    assert comparison.own == "grpo + spro.process"
    recorded = torch.tensor([x for group in groups for row in group.columns["advantages"] for x in row])
    close(comparison.scores[comparison.own], recorded, atol=1e-6, rtol=1e-6)
    assert next(iter(compare_credits(found, groups).scores)) == comparison.own
    out = str(tmp_path / "r.html")
    words = "[grpo, {sum: [grpo, {name: spro, weight: 0.5, part: process}]}, {name: opo, leave_one_out: true}]"
    assert main(["report", str(trained / "sum"), "-o", out, "--credits", words]) == 0
    for wrong, piece in (("[{sum: [grop]}]", "credit.sum[0].name"), ("[{sum: [{nam: 3}]}]", "entry 1"), ("[3]", "3")):
        assert main(["report", str(trained / "sum"), "-o", out, "--credits", wrong]) == 2
        assert piece in capsys.readouterr().err
    assert main(["show", str(trained / "sum"), "--column", "term/spro.process"]) == 0
    assert "term spro.process" in capsys.readouterr().out
