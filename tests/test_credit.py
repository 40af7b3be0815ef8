"""Credit functions: vectors by hand, an independent reference on random groups, and how they are called."""

import pytest
import reference_credit
import torch
from builders import (
    LOGPROBS,
    flat_forest,
    is_near,
    judge_only_sampled,
    random_forest,
    random_trees,
    run,
    squeezed,
    variants,
)
from torch import Tensor

from stepcredit.credit import CREDIT, assign, check_options, credit, needs_of
from stepcredit.credit.spro import cumulative_process_reward
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree

# ---------------------------------------------------------------------- by hand

ELL = [[0.2, -0.1, 0.4], [0.0, 0.3], [-0.2, 0.1, 0.1, 0.5]]


def paper_group(ell: list = ELL, rewards=(1.0, 0.0, 1.0)) -> Forest:
    ref = [[-1.0 - index] * len(row) for index, row in enumerate(ell)]
    old = [[x - 1.0 - index for x in row] for index, row in enumerate(ell)]
    return flat_forest([[len(row) for row in ell]], [rewards], old_logprobs=[old], ref_logprobs=[ref])


def test_spro_vector_of_the_notes():
    """G = 3, beta 0.05: cumulative rewards, masked step advantages and their sum with the outcome part."""
    forest = paper_group()
    cpr = [0.010, 0.005, 0.025, 0, 0.015, -0.010, -0.005, 0, 0.025]
    msa = [0.010, 0, 0.0125, 0, 0.010, -0.010, -0.010, -0.0125, 0]
    total = [0.58735, 0.57735, 0.58985, -1.15470, -1.14470, 0.56735, 0.56735, 0.56485, 0.57735]
    is_near(cumulative_process_reward(forest, 0.05), cpr, 1e-6)
    is_near(run(forest, "spro", "process"), msa, 1e-6)
    is_near(run(forest, "spro"), total)


LENGTHS, REWARDS = [[4, 1, 3, 2]], [[1.0, 0.0, 1.0, 0.0]]
SQRT = 3**0.5 / 2
BY_HAND = [
    ("grpo", {}, [SQRT, -SQRT, SQRT, -SQRT]),
    ("dr_grpo", {}, [0.5, -0.5, 0.5, -0.5]),
    ("rloo", {}, [2 / 3, -2 / 3, 2 / 3, -2 / 3]),
    ("gpg", {}, [0.5, -0.5, 0.5, -0.5]),
    ("gpg", {"alpha": "nonzero"}, [1.0, -1.0, 1.0, -1.0]),  # 4 completions, 2 of them with a reward
    ("opo", {}, [0.3, -0.7, 0.3, -0.7]),
    ("opo", {"leave_one_out": True}, [1 - 3 / 6, -7 / 9, 1 - 4 / 7, -7 / 8]),
    # 7 tokens of return 1, 3 of return 0: mean .7, variance 2.1 / 9
    ("reinforce_pp", {}, [0.3 / (2.1 / 9) ** 0.5, -0.7 / (2.1 / 9) ** 0.5] * 2),
    ("reinforce_pp_baseline", {}, [0.3 / (2.1 / 9) ** 0.5, -0.7 / (2.1 / 9) ** 0.5] * 2),
    ("reward_to_go", {}, [2 / 3, -2 / 3, 2 / 3, -2 / 3]),
    ("reward_to_go", {"baseline": "mean"}, [0.5, -0.5, 0.5, -0.5]),
    ("reward_to_go", {"baseline": "none"}, [1.0, 0.0, 1.0, 0.0]),
]


@pytest.mark.parametrize("name, options, expected", BY_HAND, ids=[f"{n}-{o}" for n, o, _ in BY_HAND])
def test_outcome_credit_by_hand(name, options, expected):
    """One number for each of four completions of 4, 1, 3, 2 tokens and rewards 1, 0, 1, 0, on every token."""
    forest = flat_forest(LENGTHS, REWARDS)
    wanted = [value for value, size in zip(expected, LENGTHS[0], strict=True) for _ in range(size)]
    is_near(run(forest, name, **options), wanted)


def test_remax_by_hand():
    """Three problems whose greedy completions got 1, 0 and 0.5; a single completion has an advantage too."""
    forest = flat_forest([[2, 1], [1], [1, 1]], [[1.0, 0.0], [1.0], [1.0, None]])
    forest = forest.with_token(greedy_return=torch.tensor([1.0, 0.0, 0.5])[forest.token_tree])
    is_near(run(forest, "remax"), [0.0, 0, -1, 1, 0.5, 0])


def test_gpg_makes_up_for_uniform_groups():
    """6 judged completions, 4 of them in groups that differ: alpha 3/2; a singleton is uniform."""
    forest = flat_forest([[1, 1], [1], [1, 1], [2, 1]], [[1.0, 0.0], [1.0], [0.0, 1.0], [1.0, None]])
    is_near(run(forest, "gpg"), [0.75, -0.75, 0, -0.75, 0.75, 0, 0, 0])
    is_near(run(forest, "gpg", alpha="none"), [0.5, -0.5, 0, -0.5, 0.5, 0, 0, 0])
    is_near(run(forest, "gpg", alpha="nonzero"), [0.75, -0.75, 0, -0.75, 0.75, 0, 0, 0])  # 4 of 6 have a reward


def test_gpg_leaves_out_what_a_shaper_masked():
    """With the uniform groups masked nothing is to be made up for: alpha 1."""
    forest = flat_forest([[1, 1], [1], [1, 1]], [[1.0, 0.0], [1.0], [1.0, 1.0]])
    forest = forest.with_segment(mask=forest.segment["tree"] == 0)
    is_near(run(forest, "gpg"), [0.5, -0.5, 0, 0, 0])
    is_near(run(forest, "gpg", alpha="nonzero"), [1.0, -1.0, 0, 0, 0])


def test_opo_vector_of_the_notes():
    """Lengths 100, 400, 300, 200 and rewards 1, 0, 1, 0: the baseline is 0.4; leave-one-out as in the notes."""
    forest = flat_forest([[100, 400, 300, 200]], REWARDS)
    first = forest.segment["start"]
    is_near(run(forest, "opo")[first], [0.6, -0.4, 0.6, -0.4])
    is_near(run(forest, "opo", leave_one_out=True)[first], [2 / 3, -2 / 3, 6 / 7, -0.5])


def test_dense_rewards_by_hand():
    """Token rewards are summed from each token on, discounted; the outcome reward stands on the last token."""
    dense = [[[0.5, 0.0, 0.25], [0.0, 1.0]]]
    forest = flat_forest([[3, 2]], [[1.0, 0.0]], token_rewards=dense)
    is_near(run(forest, "reward_to_go", baseline="none"), [1.75, 1.25, 1.25, 1.0, 1.0])
    is_near(run(forest, "reward_to_go", baseline="none", gamma=0.5), [0.8125, 0.625, 1.25, 0.5, 1.0])
    is_near(run(forest, "reward_to_go"), [0.75, 0.25, 0.25, -0.75, -0.75])  # the others' returns: 1 and 1.75
    is_near(run(forest, "dr_grpo"), [0.375] * 3 + [-0.375] * 2)  # returns 1.75 and 1


def test_the_end_of_a_completion_is_its_last_sampled_token():
    """After a closing tool segment the outcome reward stands on the last sampled token; the tool's tokens get 0."""
    segments = [Segment([1, 2]), Segment([3, 4], parent=0, sampled=False, reward=1.0), Segment([5], reward=0.0)]
    forest = Forest.from_trees([Tree(Problem(), [1], segments)])
    is_near(run(forest, "reward_to_go", baseline="none", gamma=0.5), [0.5, 1.0, 0, 0, 0])
    is_near(run(forest, "opo"), [1 / 3, 1 / 3, 0, 0, -2 / 3])  # lengths 2 and 1


def test_tool_tokens_are_not_counted_by_the_discount():
    """gamma counts sampled tokens, like positions do: a tool's answer in between does not fade the reward."""
    segments = [Segment([1]), Segment([2] * 9, parent=0, sampled=False), Segment([3], parent=1, reward=1.0)]
    forest = Forest.from_trees([Tree(Problem(), [1], segments)])
    is_near(run(forest, "reward_to_go", baseline="none", gamma=0.5), [0.5] + [0.0] * 9 + [1.0])


# ---------------------------------------------------------------------- against the reference


@variants
@pytest.mark.parametrize("kind, unsampled", [("flat", 0.0), ("chain", 0.0), ("chain", 0.3)])
@pytest.mark.parametrize("dense", [False, True])
def test_equal_to_the_reference(name, options, kind, unsampled, dense):
    """Random ragged groups, with unjudged completions, singletons, tool segments and token rewards."""
    columns = (*LOGPROBS, "token_rewards") if dense else LOGPROBS
    for seed in range(6):
        trees = random_trees(seed, kind, unsampled=unsampled, columns=columns)
        for tree in trees:
            judge_only_sampled(tree)
        if dense and name == "treerpo":  # takes values in [0, 1]
            squeezed(trees)
        expected = reference_credit.advantages(name, trees, **options)
        is_near(run(Forest.from_trees(trees), name, **options), expected, 2e-4 if "normalize" in options else 5e-5)
        if name == "spro" or (name == "prime" and "whitening" not in options):
            process = {option: value for option, value in options.items() if option != "outcome_coef"}
            expected = reference_credit.advantages(f"{name}_process", trees, **process)
            is_near(run(Forest.from_trees(trees), name, "process", **options), expected, 2e-4)


@pytest.mark.parametrize("name", ["reinforce_pp", "reward_to_go"])
@pytest.mark.parametrize("gamma", [0.9, 0.0])
def test_discounted_returns_equal_the_reference(name, gamma):
    """With gamma < 1, over completions of several segments."""
    for seed in range(4):
        trees = random_trees(seed, "chain", columns=("token_rewards",))
        expected = reference_credit.advantages(name, trees, gamma=gamma)
        is_near(run(Forest.from_trees(trees), name, gamma=gamma), expected, 5e-5)


# ---------------------------------------------------------------------- calling


def test_assign_refuses_branching_forests_for_flat_credit():
    """The message names the credit and the tree that branches; the others are those of trees."""
    forest = random_forest(0, "deep")
    flat = {name: function for name, function in CREDIT.items() if needs_of(function).forests == "flat"}
    assert CREDIT.keys() - flat.keys() == {"treerpo", "spo_tree", "gae"}
    for name, function in flat.items():
        with pytest.raises(UserError, match=f"credit '{name}' takes flat forests.*tree 'deep-0' branches"):
            assign(forest, name, function, {})


@pytest.mark.parametrize("name", ["spro", "prime"])
@pytest.mark.parametrize("missing", LOGPROBS)
def test_assign_names_a_missing_column(name, missing):
    """SPRO and PRIME need two log-probabilities each and say which one is absent; the third they do without."""
    forest = random_forest(0).without_token(missing)
    if missing == {"spro": "prm_logprobs", "prime": "old_logprobs"}[name]:
        assert run(forest, name).equal(run(random_forest(0), name))
        return
    with pytest.raises(UserError, match=f"credit '{name}' needs the column '{missing}'"):
        run(forest, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_assign_refuses_values_that_are_not_finite(value):
    """The message names the column, the tree and the segment."""
    forest = flat_forest([[1], [2, 3]], [[1.0], [0.0, 1.0]])

    def mine(forest: Forest) -> Tensor:
        return torch.where(forest.token["segment"] == 2, value, 0.0)

    with pytest.raises(UserError, match="credit 'mine': advantages is not finite in tree 'g1', segment 1"):
        assign(forest, "mine", mine, {})


def test_assign_refuses_the_wrong_length():
    """One number for each segment is not one for each token."""
    forest = flat_forest([[1], [2, 3]], [[1.0], [0.0, 1.0]])
    with pytest.raises(UserError, match=r"returned advantages of shape \(3,\).*each of the 6 tokens"):
        assign(forest, "mine", lambda forest: torch.zeros(3), {})


def test_assign_keeps_gradients_out_and_branching_forests_in_where_declared():
    """A credit declared for trees takes them; its result is fp32 and carries no gradient."""

    @credit("old_logprobs", forests="tree")
    def mine(forest: Forest, scale: float = 2.0) -> Tensor:
        return scale * forest.token["old_logprobs"].double()

    forest = random_forest(0, "deep")
    forest = forest.with_token(old_logprobs=forest.token["old_logprobs"].requires_grad_())
    found = assign(forest, "mine", mine, {"scale": 3.0}).token["advantages"]
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, 3 * forest.token["old_logprobs"].detach())


WRONG_OPTIONS = [
    ("spro", {"betta": 0.1}, "credit 'spro' has no option 'betta': did you mean 'beta'?"),
    ("opo", {"leave_one_ot": True}, "did you mean 'leave_one_out'?"),
    ("grpo", {"beta": 0.1}, "credit 'grpo' has no option 'beta': it has no options"),
    ("spro", {"beta": "big"}, "credit.beta: 'big' is not a float"),
    ("spro", {"beta": True}, "credit.beta: True is not a float"),
    ("opo", {"leave_one_out": 1}, "credit.leave_one_out: 1 is not a bool"),
    ("prime", {"estimator": "ppo"}, "credit.estimator: 'ppo' is not one of rloo, grpo, reinforce"),
    ("spro", {"uniform": "maybe"}, "credit.uniform: 'maybe' is not one of keep, drop"),
    ("spro", {"uniform": False}, "credit.uniform: False is not one of keep, drop"),
    ("spro", {"normalize": "group"}, "credit.normalize: 'group' is not one of none, batch"),
    ("spro", {"beta": float("nan")}, "credit.beta: nan is not a finite number"),
    ("reward_to_go", {"baseline": "median"}, "credit.baseline: 'median' is not one of leave_one_out, mean, none"),
]


@pytest.mark.parametrize("name, options, message", WRONG_OPTIONS)
def test_wrong_options_are_named(name, options, message):
    """A misspelt option gets a hint, a wrong value the choices or the default."""
    with pytest.raises(UserError) as error:
        check_options(name, CREDIT[name], options)
    assert message in str(error.value)


def test_right_options_pass():
    """A whole number may stand for a float; a function with **options takes anything."""
    check_options("spro", CREDIT["spro"], {"beta": 1, "uniform": "drop", "cumsum": False})
    check_options("mine", lambda forest, **options: None, {"anything": object()})


@pytest.mark.parametrize(
    "name, gamma", [("reward_to_go", 1.5), ("reinforce_pp", -0.1), ("prime", 1.5), ("prime", -0.1)]
)
def test_a_discount_out_of_range_is_named(name, gamma):
    """gamma lies in [0, 1]."""
    with pytest.raises(UserError, match=rf"credit.gamma must lie in \[0, 1\], got {gamma}"):
        run(random_forest(0), name, gamma=gamma)


def test_what_is_not_a_tensor_is_refused():
    """A credit that forgets its return gets a message, not a traceback."""
    with pytest.raises(UserError, match="credit 'mine' returned a NoneType"):
        assign(random_forest(0), "mine", lambda forest: None, {})
