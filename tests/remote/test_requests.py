"""What is sent to a server and what comes back; which server is asked."""

import pytest
from fake_server import COMPLETIONS, PARAMS, PROMPTS, SEEDS, STOP, ids, made_up, sampling

from stepcredit.samplers.params import SamplingParams


def test_what_is_sent_and_what_comes_back(policy, fake):
    with sampling(policy, fake) as sampler:
        counted: list[int] = []
        sampler.on_progress = counted.append
        params = SamplingParams(temperature=0.5, max_new_tokens=6, stop_token_ids=(STOP, 9))
        groups = sampler.sample(PROMPTS, 4, params, SEEDS, [6, 4, 2, 1])
    bodies = {tuple(body["prompt"]): body for path, body in fake.requests if path == COMPLETIONS}
    assert list(map(list, sorted(bodies))) == sorted(PROMPTS)
    for prompt, limit, group in zip(PROMPTS, [6, 4, 2, 1], groups, strict=True):
        body = bodies[tuple(prompt)]
        expected = {"n": 4, "max_tokens": limit, "temperature": 0.5, "top_p": 1.0, "stop_token_ids": [STOP, 9]}
        expected |= {"model": "policy", "ignore_eos": True, "return_token_ids": True, "add_special_tokens": False}
        expected |= {"logprobs": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        assert body | expected | {"top_k": -1, "min_p": 0.0} == body
        assert group == [made_up(body, number) for number in range(4)]  # ids, finish and log-probabilities, in order
    segments = [segment for group in groups for segment in group]
    assert {segment.finish for segment in segments} == {"stop", "length"}
    assert all((segment.token_ids[-1] == STOP) == (segment.finish == "stop") for segment in segments)
    assert sum(counted) == 16


def test_greedy_sampling_is_asked_for_once(policy, fake):
    """vLLM refuses several; they are copies of one."""
    with sampling(policy, fake) as sampler:
        counted: list[int] = []
        sampler.on_progress = counted.append
        groups = sampler.sample(PROMPTS, 3, SamplingParams(temperature=0.0, max_new_tokens=6), SEEDS)
    assert all(body["n"] == 1 for path, body in fake.requests if path == COMPLETIONS)
    assert all(len(group) == 3 and group[0] == group[1] == group[2] for group in groups) and sum(counted) == 12
    assert groups[0][0].token_ids is not groups[0][1].token_ids


def test_the_models_own_stop_ids_and_limit(policy, fake):
    with sampling(policy, fake) as sampler:
        sampler.sample(PROMPTS[:1], 1, SamplingParams(max_new_tokens=5, top_k=3, top_p=0.5), [1])
        assert sampler.sample([], 4, PARAMS, []) == []
    body = fake.requests[-1][1]
    assert body["stop_token_ids"] == policy.stop_token_ids == [STOP]
    assert body["max_tokens"] == 5 and body["top_k"] == 3 and body["top_p"] == 0.5


@pytest.mark.parametrize(
    "options, full",
    [
        ({}, True),
        ({"temperature": 0.7}, True),
        ({"top_p": 0.9}, True),
        ({"temperature": 0.7, "top_p": 0.9}, False),
        ({"temperature": 0.7, "top_k": 5}, False),
    ],
)
def test_logprobs_only_where_they_are_of_the_full_distribution(policy, fake, options, full):
    with sampling(policy, fake) as sampler:
        segment = sampler.sample(PROMPTS[:1], 1, SamplingParams(max_new_tokens=4, **options), [1])[0][0]
    assert ("rollout_logprobs" in segment.columns) == full


def test_seeds(policy, fake):
    """The same for the same, whatever else is sampled; neighbouring seeds share nothing."""
    with sampling(policy, fake) as sampler:
        params = SamplingParams(max_new_tokens=12)
        first = ids(sampler.sample(PROMPTS, 4, params, SEEDS))
        assert ids(sampler.sample(PROMPTS, 4, params, SEEDS)) == first
        assert ids(sampler.sample(PROMPTS[2:], 4, params, SEEDS[2:])) == first[2:]
        assert ids(sampler.sample(PROMPTS, 4, params, [7, 8, 9, 10])) != first
        same = ids(sampler.sample([PROMPTS[0]] * 3, 6, params, [2**62 - 1, 2**62 - 2, 5]))
    completions = [tuple(one) for group in same for one in group]
    assert len(set(completions)) == len(completions)
    assert all(0 <= body["seed"] < 2**62 for path, body in fake.requests if path == COMPLETIONS)


def test_requests_are_balanced(policy, fakes):
    """Over servers of one speed evenly, over others by what they have to do; never more than `max_rows` at once."""
    first, second = fakes(), fakes()
    first.delay = second.delay = 0.03
    with sampling(policy, first, second, max_rows=8) as sampler:
        sampler.sample(PROMPTS * 5, 2, PARAMS, range(20))
        assert abs(len(first.served) - len(second.served)) <= 4
        assert first.most <= 2 and second.most <= 2
        second.delay, before = 0.2, [len(first.served), len(second.served)]
        sampler.sample(PROMPTS * 5, 2, PARAMS, range(20))
    fast, slow = len(first.served) - before[0], len(second.served) - before[1]
    assert fast + slow == 20 and fast > 2 * slow > 0
