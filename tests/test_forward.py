"""The forest forward: equal to one row at a time, whatever the shape, the order, the parts and the model."""

import logging

import pytest
import torch
from tiny_models import (
    FAMILIES,
    UNSHAREABLE,
    VOCABULARY,
    fresh,
    gradients,
    random_forest,
    random_trees,
    reference_scores,
    relative_distance,
    tiny,
)

from stepcredit.forest import Forest
from stepcredit.policy import forward
from stepcredit.policy.batching import cut
from stepcredit.policy.forward import choose_path, score
from stepcredit.types import Problem, Segment, Tree

TOLERANCE = 1e-5
families = pytest.mark.parametrize("family", FAMILIES)
shapes = pytest.mark.parametrize("deep", [False, True], ids=["flat", "deep"])
paths = pytest.mark.parametrize("path", ["forest", "plain"])


def weights(forest: Forest, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, forest.num_tokens, generator=torch.Generator().manual_seed(seed))


def on_path(family: str, path: str):
    policy = tiny(family)
    return forward.Policy(policy.model, policy.tokenizer, path=path)


def chain(num_segments: int) -> Forest:
    """A path of many segments with a twig at each."""
    segments = []
    for index in range(num_segments):
        up = 2 * index - 2 if index else -1
        segments += [Segment([3 + index, 5], parent=up), Segment([7, 8 + index, 9], parent=up)]
    return Forest.from_trees([Tree(Problem(), [4], segments), Tree(Problem(), [1] * 20, [Segment([6])])])


@families
@shapes
@paths
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_scores_equal_the_models_own_logits(family, deep, path, temperature):
    """Log-probabilities and entropies of random ragged forests equal those of one row at a time."""
    policy = on_path(family, path)
    for seed in range(4):
        forest = random_forest(seed, deep)
        with torch.no_grad():
            found = policy(forest, temperature)
            logprobs, entropy = reference_scores(policy, forest, temperature)
        assert entropy.min() > 0.01 and logprobs.std() > 0.5  # the model says something
        torch.testing.assert_close(found.logprobs, logprobs, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(found.entropy, entropy, atol=TOLERANCE, rtol=0)


@families
@shapes
@paths
@pytest.mark.parametrize("entropy_grad", [False, True], ids=["logprobs", "logprobs+entropy"])
def test_gradients_equal_the_models_own(family, deep, path, entropy_grad):
    """The gradient of a random weighted sum equals that of one row at a time; entropies join in only when asked."""
    policy = on_path(family, path)
    for seed in range(2):
        forest = random_forest(10 + seed, deep)
        weight = weights(forest, seed)
        found = policy(forest, 0.7, entropy_grad)
        logprobs, entropy = reference_scores(policy, forest, 0.7)
        assert found.entropy.requires_grad == entropy_grad
        expected = gradients(policy, (weight[0] * logprobs).sum() + entropy_grad * (weight[1] * entropy).sum())
        actual = gradients(policy, (weight[0] * found.logprobs).sum() + (weight[1] * found.entropy).sum())
        assert relative_distance(actual, expected) < TOLERANCE


@pytest.mark.parametrize("seed", range(3))
def test_forward_calls_of_any_size_give_the_same(monkeypatch, seed):
    """Levels cut into many small forward calls change neither scores nor gradients."""
    policy, forest = tiny("qwen3"), random_forest(20 + seed, deep=True)
    weight = weights(forest)[0]
    whole = policy(forest)
    monkeypatch.setattr(forward, "MAX_POSITIONS", 5)
    pieces = policy(forest)
    torch.testing.assert_close(pieces.logprobs, whole.logprobs, atol=TOLERANCE, rtol=0)
    expected = gradients(policy, (weight * whole.logprobs).sum())
    assert relative_distance(gradients(policy, (weight * pieces.logprobs).sum()), expected) < TOLERANCE


def test_a_path_of_many_segments():
    """Padding of every level above is carried along correctly."""
    policy, forest = tiny("qwen2"), chain(12)
    with torch.no_grad():
        torch.testing.assert_close(policy(forest).logprobs, reference_scores(policy, forest)[0], atol=TOLERANCE, rtol=0)


@families
@shapes
@pytest.mark.parametrize("budget", [1, 30, 10**6])
def test_parts_add_up_to_the_whole_gradient(family, deep, budget):
    """Over micro-batches of any budget, also with split trees, weights where owned give the gradient of the whole."""
    policy, forest = tiny(family), random_forest(30, deep)
    weight = weights(forest)[0]
    expected = gradients(policy, (weight * policy(forest).logprobs).sum())
    pieces = cut(forest, budget)
    assert len(pieces) == 1 if budget == 10**6 else len(pieces) > 1
    total = torch.zeros_like(expected)
    for piece in pieces:
        kept = weight[piece.token["source"]] * piece.token["owned"]
        total += gradients(policy, (kept * policy(piece).logprobs).sum())
    assert relative_distance(total, expected) < TOLERANCE


@shapes
@pytest.mark.parametrize("budget", [1, 25, 10**6])
def test_score_equals_the_forward(deep, budget):
    """`score` gives the forward's values in the forest's own order, without gradients, for any budget."""
    policy, forest = tiny("llama"), random_forest(40, deep, unsampled=0.3)
    scored = score(policy, forest, 0.7, budget)
    whole = policy(forest, 0.7, entropy_grad=True)
    assert not scored.logprobs.requires_grad and not scored.entropy.requires_grad
    torch.testing.assert_close(scored.logprobs, whole.logprobs.detach(), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(scored.entropy, whole.entropy.detach(), atol=TOLERANCE, rtol=0)


@paths
@pytest.mark.parametrize("seed", range(3))
def test_tokens_that_were_not_sampled_score_zero(path, seed):
    """Tool and user tokens have log-probability and entropy 0; all others have the values of their full path."""
    policy, forest = on_path("qwen2", path), random_forest(50 + seed, deep=True, unsampled=0.4)
    sampled = forest.token_sampled
    assert 0 < sampled.sum() < len(sampled)
    with torch.no_grad():
        found = policy(forest)
        logprobs, entropy = reference_scores(policy, forest)
    assert (found.logprobs[~sampled] == 0).all() and (found.entropy[~sampled] == 0).all()
    torch.testing.assert_close(found.logprobs, logprobs, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.entropy, entropy, atol=TOLERANCE, rtol=0)


@paths
def test_tokens_that_were_not_sampled_condition_what_follows(path):
    """Another tool answer changes the scores after it and nothing else."""
    policy = on_path("qwen3", path)

    def logprobs(answer: int) -> torch.Tensor:
        segments = [
            Segment([5, 6]),
            Segment([answer], parent=0, sampled=False),
            Segment([7, 8], parent=1),
            Segment([9]),
        ]
        with torch.no_grad():
            return policy(Forest.from_trees([Tree(Problem(), [3, 4], segments)])).logprobs

    changed = (logprobs(11) - logprobs(12)).abs() > 1e-3
    assert changed.tolist() == [False, False, False, True, True, False]


@paths
def test_a_forest_without_sampled_tokens(path):
    """Nothing to score is no error."""
    forest = Forest.from_trees([Tree(Problem(), [3], [Segment([4, 5], sampled=False)])])
    assert on_path("qwen2", path)(forest).logprobs.tolist() == [0, 0]


@shapes
@pytest.mark.parametrize("seed", range(3))
def test_order_of_trees_and_siblings_does_not_matter(deep, seed):
    """A token's score stays with it when trees and segments are shuffled."""
    policy, generator = tiny("qwen2"), torch.Generator().manual_seed(seed)
    trees = random_trees(60 + seed, deep)
    rows, first = [], 0  # of each segment: its tokens' rows in the first forest
    for tree in trees:
        bounds = torch.tensor([len(segment.token_ids) for segment in tree.segments])
        rows.append(torch.arange(first, first + int(bounds.sum())).split(bounds.tolist()))
        first += int(bounds.sum())
    shuffled, source = [], []
    for number in torch.randperm(len(trees), generator=generator).tolist():
        segments, place = [], {-1: -1}
        waiting = list(range(len(trees[number].segments)))
        while waiting:  # parents stand before children
            ready = [index for index in waiting if trees[number].segments[index].parent in place]
            index = ready[int(torch.randint(len(ready), (), generator=generator))]
            old = trees[number].segments[index]
            place[index] = len(segments)
            segments.append(Segment(old.token_ids, parent=place[old.parent]))
            source.append(rows[number][index])
            waiting.remove(index)
        shuffled.append(Tree(Problem(), trees[number].prompt_ids, segments))
    order = torch.cat(source)
    assert order.tolist() != sorted(order.tolist())
    with torch.no_grad():
        found, expected = policy(Forest.from_trees(shuffled)), policy(Forest.from_trees(trees))
    torch.testing.assert_close(found.logprobs, expected.logprobs[order], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.entropy, expected.entropy[order], atol=TOLERANCE, rtol=0)


@paths
def test_bf16_autocast_is_near(path):
    """Computing in bf16 keeps fp32 weights, outputs and gradients, near those of fp32."""
    policy, forest = on_path("llama", path), random_forest(70, deep=True)
    weight = weights(forest)[0]
    exact = policy(forest)
    policy.autocast = torch.bfloat16
    near = policy(forest)
    assert near.logprobs.dtype == near.entropy.dtype == torch.float32
    difference = (near.logprobs - exact.logprobs).abs()
    assert 0 < difference.max() < 0.3 and difference.mean() < 0.05
    expected = gradients(policy, (weight * exact.logprobs).sum())
    assert relative_distance(gradients(policy, (weight * near.logprobs).sum()), expected) < 0.1


@families
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_good_models_take_the_forest_path(family, autocast):
    policy = on_path(family, "plain")
    policy.autocast = autocast
    assert choose_path(policy) < TOLERANCE
    assert policy.path == "forest" and policy.autocast == autocast


@pytest.mark.parametrize("family", UNSHAREABLE)
def test_models_that_change_logits_after_the_head_take_the_plain_path(family, caplog):
    """The fallback is said in the log, and the plain path equals the model's own logits."""
    policy, forest = fresh(family), random_forest(80, deep=True)
    with caplog.at_level(logging.WARNING, "stepcredit"):
        assert 1e-2 < choose_path(policy) < float("inf")
    assert policy.path == "plain" and "one row per completion" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(policy(forest).logprobs, reference_scores(policy, forest)[0], atol=TOLERANCE, rtol=0)


def test_a_model_that_cannot_run_the_forest_form_takes_the_plain_path(monkeypatch, caplog):
    def refuse(*args):
        raise NotImplementedError("no cache here")

    policy = on_path("qwen2", "forest")
    monkeypatch.setattr(policy, "_hidden", refuse)
    assert choose_path(policy) == float("inf")
    assert policy.path == "plain" and "no cache here" in caplog.text


def test_sliding_windows_are_exact_beyond_the_window():
    """On the path that is chosen, a window shorter than a prompt with a completion gives the model's own logits."""
    policy = fresh("Mistral", sliding_window=24)
    prompts = [[index % VOCABULARY for index in range(length)] for length in (8, 40)]
    segments = [Segment([5, 6, 7]), Segment(list(range(30))), Segment([8, 9, 10], parent=0)]
    forest = Forest.from_trees([Tree(Problem(), prompt, segments) for prompt in prompts])
    choose_path(policy)
    with torch.no_grad():
        torch.testing.assert_close(policy(forest).logprobs, reference_scores(policy, forest)[0], atol=TOLERANCE, rtol=0)
