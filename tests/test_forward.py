"""Scoring forests: equal to one row at a time, whatever the path, the shape, the order, the parts and the model."""

import logging

import pytest
import torch
from tiny_models import (
    FAMILIES,
    OTHERS,
    VOCABULARY,
    fresh,
    gradients,
    random_forest,
    random_trees,
    reference_scores,
    relative_distance,
    tiny,
)

from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.policy import flex, forward, packing, reference
from stepcredit.policy.batching import split_into_parts
from stepcredit.policy.forward import choose_scoring_form, score

TOLERANCE = 1e-5
families = pytest.mark.parametrize("family", FAMILIES)
shapes = pytest.mark.parametrize("deep", [False, True], ids=["flat", "deep"])
paths = pytest.mark.parametrize("path", ["forest", "cached", "plain"])
others = pytest.mark.parametrize("family", OTHERS)


def weights(forest: Forest, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, forest.num_tokens, generator=torch.Generator().manual_seed(seed))


def on_path(family: str, path: str):
    """A policy of its own: a path belongs to the model."""
    policy = fresh(family)
    policy.scoring_form = path
    return policy


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


@others
@shapes
def test_other_models_are_exact(family, deep):
    """Scaled and capped logits, capped scores, windows shorter than the paths, experts: scores and gradients."""
    policy, model = tiny(family), on_path(family, "plain")
    for seed in range(2):
        forest = random_forest(10 + seed, deep)
        weight = weights(forest, seed)
        found, (logprobs, entropy) = policy(forest, 0.7, True), reference_scores(model, forest, 0.7)
        torch.testing.assert_close(found.logprobs, logprobs, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(found.entropy, entropy, atol=TOLERANCE, rtol=0)
        expected = gradients(model, (weight[0] * logprobs).sum() + (weight[1] * entropy).sum())
        actual = gradients(policy, (weight[0] * found.logprobs).sum() + (weight[1] * found.entropy).sum())
        assert relative_distance(actual, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("alone", [1, 10**9], ids=["one by one", "batched"])
def test_blocks_batched_in_any_way_give_the_same(monkeypatch, family, alone):
    """Every block in a call of its own, or as many as pay: the same scores and gradients."""
    policy, forest = tiny(family), random_forest(20, deep=True)
    weight = weights(forest)[0]
    found = policy(forest)
    expected = gradients(policy, (weight * found.logprobs).sum())
    monkeypatch.setattr(packing, "UNBATCHED_SCORES", {"cpu": alone})
    other = policy(forest)
    torch.testing.assert_close(other.logprobs, found.logprobs, atol=TOLERANCE, rtol=0)
    assert relative_distance(gradients(policy, (weight * other.logprobs).sum()), expected) < TOLERANCE


@pytest.mark.parametrize("seed", range(3))
def test_levels_of_any_size_give_the_same(monkeypatch, seed):
    """Levels of the cached form cut into many small forward calls change neither scores nor gradients."""
    policy, forest = on_path("qwen3", "cached"), random_forest(20 + seed, deep=True)
    weight = weights(forest)[0]
    whole = policy(forest)
    monkeypatch.setattr(reference, "MAX_POSITIONS", 5)
    pieces = policy(forest)
    torch.testing.assert_close(pieces.logprobs, whole.logprobs, atol=TOLERANCE, rtol=0)
    expected = gradients(policy, (weight * whole.logprobs).sum())
    assert relative_distance(gradients(policy, (weight * pieces.logprobs).sum()), expected) < TOLERANCE


@paths
def test_only_owned_tokens_are_scored(path):
    """Tokens that a part does not own score 0, and the others what they score without ownership."""
    policy, forest = on_path("qwen2", path), random_forest(25, deep=True)
    owned = torch.arange(forest.num_tokens) % 3 > 0
    with torch.no_grad():
        whole, part = policy(forest), policy(forest.with_token(owned=owned))
    for found, expected in zip(part, whole, strict=True):
        assert (found[~owned] == 0).all() and (expected[~owned] != 0).all()
        torch.testing.assert_close(found[owned], expected[owned], atol=TOLERANCE, rtol=0)


@paths
def test_a_path_of_many_segments(path):
    """Every level above is seen, and nothing else."""
    policy, forest = on_path("qwen2", path), chain(12)
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
    pieces = split_into_parts(forest, budget)
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


@pytest.mark.parametrize("path", ["forest", "plain"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "mixtral"])
def test_layers_computed_again_give_the_same_gradient(family, autocast, path):
    """To the last bit; each layer runs twice where there is a gradient, and once where there is none."""
    policy = on_path(family, path)
    policy.autocast = autocast
    forest = random_forest(5, deep=True)
    expected = gradients(policy, policy(forest).logprobs.sum())
    policy.checkpoint_layers()
    layers, runs = list(policy.model.base_model.layers), []
    for layer in layers:
        layer.self_attn.register_forward_hook(lambda module, *_: runs.append(module))
    scores = policy(forest)
    assert len(runs) == len(layers) and not any(module.training for module in policy.model.modules())
    found = gradients(policy, scores.logprobs.sum())
    assert len(runs) == 2 * len(layers) and torch.equal(found, expected)
    score(policy, forest, 1.0, 10**6)
    assert len(runs) == 3 * len(layers)


def test_what_cannot_be_computed_again(monkeypatch):
    policy = fresh("qwen2")
    policy.scoring_form = "cached"
    with pytest.raises(UserError, match="the cached form"):
        policy.checkpoint_layers()
    policy.scoring_form = "forest"
    monkeypatch.setattr(forward, "GradientCheckpointingLayer", int)
    with pytest.raises(UserError, match="the layers of this model"):
        policy.checkpoint_layers()


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
    assert choose_scoring_form(policy) < TOLERANCE
    assert policy.scoring_form == "forest" and policy.autocast == autocast


def test_a_model_that_is_none_of_these_takes_the_plain_path(caplog):
    """Logits changed in a way that no config names: found by comparing, said in the log, and scored as they are."""
    policy, forest = fresh("qwen2"), random_forest(80, deep=True)
    policy.model.register_forward_hook(lambda module, args, out: setattr(out, "logits", out.logits * 0.5))
    with caplog.at_level(logging.WARNING, "stepcredit"):
        assert choose_scoring_form(policy) == float("inf")
    assert policy.scoring_form == "plain" and "one row per completion" in caplog.text and "differs" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(policy(forest).logprobs, reference_scores(policy, forest)[0], atol=TOLERANCE, rtol=0)


def test_attention_sinks_are_refused(caplog):
    """A model with scores of its own beside the keys' is scored one row per completion, exactly."""
    policy, forest = (
        fresh("GptOss", num_local_experts=2, num_experts_per_tok=1, sliding_window=8),
        random_forest(81, True),
    )
    with caplog.at_level(logging.WARNING, "stepcredit"):
        choose_scoring_form(policy)
    assert policy.scoring_form == "plain" and "s_aux" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(policy(forest).logprobs, reference_scores(policy, forest)[0], atol=TOLERANCE, rtol=0)


def test_a_window_that_only_the_mask_knows_is_refused():
    """A layer that does not tell its attention function about the window of its config cannot be taken over."""
    policy = fresh("llama")
    policy.model.config.sliding_window = 4
    with pytest.raises(NotImplementedError, match="window"):
        policy(random_forest(0, deep=True))


def test_a_model_that_cannot_run_the_forest_form_takes_the_cached_one(monkeypatch, caplog):
    def refuse(*args):
        raise NotImplementedError("no plans here")

    policy = fresh("qwen2")
    monkeypatch.setattr(policy, "hidden", refuse)
    assert choose_scoring_form(policy) < TOLERANCE
    assert policy.scoring_form == "cached" and "no plans here" in caplog.text


def steeper(states):
    return states.detach() + 2 * (states - states.detach())


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda states: 1.5 * states.roll(1, 1), "logprobs"),
        (steeper, "gradients"),
        (lambda states: states * torch.nan, "log"),
    ],
    ids=["values", "gradients", "nan"],
)
def test_a_form_that_is_wrong_only_in_the_types_of_training_is_not_used(monkeypatch, caplog, wrong, what):
    """Right in fp32 and wrong in bf16, forward or only backward: the next form is taken, and the log says why."""
    policy = fresh("llama")
    policy.autocast = torch.bfloat16
    right = policy.hidden

    def hidden(*args):
        states = right(*args)
        return wrong(states) if torch.is_autocast_enabled("cpu") else states

    monkeypatch.setattr(policy, "hidden", hidden)
    assert choose_scoring_form(policy) < TOLERANCE
    assert policy.scoring_form == "cached" and policy.autocast == torch.bfloat16
    assert f"the forest form is not used: its {what}" in caplog.text and "in bfloat16 differ" in caplog.text


def test_the_kernel_is_tried_where_the_model_will_compute(monkeypatch):
    """For a model in the CPU's memory: with the types, heads, windows and caps that its layers will have there."""
    tried = []
    monkeypatch.setattr(flex, "one_mask_agrees", lambda *args: tried.append(args) or True)
    policy, home = fresh("gemma2"), torch.device("cuda", 1)
    policy.autocast = torch.bfloat16
    assert choose_scoring_form(policy, home=home) < TOLERANCE and policy.scoring_form == "forest"
    heads = {flex.Heads(4, 2, 8, 8**-0.5, window, 2.0) for window in (False, True)}
    assert {args[:2] for args in tried} == {(home, torch.bfloat16)} and {args[2] for args in tried} == heads


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "mistral"])
def test_the_model_stays_an_ordinary_model(family):
    """On the forest path a call without a plan, padded or with a cache, gives what it gave before."""
    policy, other = tiny(family), on_path(family, "plain")
    ids = torch.randint(0, VOCABULARY, (3, 14), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(14)[None] >= torch.tensor([[0], [3], [9]])).long()
    with torch.no_grad():
        found, expected = (p.model(input_ids=ids, attention_mask=mask).logits for p in (policy, other))
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=TOLERANCE, rtol=0)
        new = [p.model.generate(ids[:1], do_sample=False, max_new_tokens=12, pad_token_id=0) for p in (policy, other)]
    assert new[0].equal(new[1])


def test_saved_models_do_not_ask_for_forest_attention(tmp_path):
    """A folder written by a policy loads where this library is not installed."""
    policy = tiny("qwen2")
    policy.model.save_pretrained(tmp_path)
    assert "stepcredit" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotary_embedding_that_depends_on_the_company_is_refused(kind):
    """Beyond the length where one long row would change the scores of the short ones; up to it all is exact."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 24}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    policy = fresh("llama", hidden_size=32, head_dim=8, rope_parameters=rope, max_position_embeddings=48)
    short = Forest.from_trees([Tree(Problem(), [5] * 10, [Segment([6] * 10), Segment([7] * 4)])])
    with torch.no_grad():
        found, expected = policy(short).logprobs, reference_scores(policy, short)[0]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    long = Forest.from_trees([Tree(Problem(), [5] * 10, [Segment([6] * 20), Segment([7] * 4)])])
    with pytest.raises(UserError, match="beyond 24 tokens"):
        policy(long)


def test_an_empty_prompt_is_refused():
    """Nothing predicts the first token of its completions."""
    forest = Forest.from_trees([Tree(Problem(), [1], [Segment([2])]), Tree(Problem(id="b"), [], [Segment([3])])])
    with pytest.raises(UserError, match="tree 'b' has no prompt tokens"):
        tiny("qwen2")(forest)
