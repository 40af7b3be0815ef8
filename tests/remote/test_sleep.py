"""Servers that give back their memory while the trainer learns."""

import itertools
from contextlib import closing

import pytest
import torch
from fake_server import (
    COMPLETIONS,
    PARAMS,
    PROMPTS,
    RESET,
    SEEDS,
    SLEEP,
    VLLM,
    WAKE,
    Fake,
    bigger,
    drop,
    has,
    ids,
    rows,
    train,
)

from stepcredit.errors import UserError
from stepcredit.learn.adapters import add_adapters
from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import load_policy
from stepcredit.samplers.remote.options import ServerOptions
from stepcredit.samplers.remote.sampler import RemoteSampler
from stepcredit.samplers.remote.server.stepcredit_worker import Extension

WEIGHTS, CACHE = f"{WAKE}?tags=weights", f"{WAKE}?tags=kv_cache"
LOAD = "stepcredit_load"


def sleeper(policy: Policy, *fakes: Fake, level: str = "2", way: str = "auto") -> closing:
    options = ServerOptions(sleep=level, transfer=way, patience_s=5.0)
    return closing(RemoteSampler(VLLM(), policy, [one.url for one in fakes], options))


def steps(fake: Fake) -> list[str]:
    """What it was asked since, as far as memory, weights and samples go."""
    kept = {LOAD, "stepcredit_receive", COMPLETIONS, "/v1/load_lora_adapter"}
    found = [one for one in fake.order if one in kept or one.startswith((SLEEP, WAKE))]
    fake.order.clear()
    return [one for one, _ in itertools.groupby(found)]


@pytest.mark.parametrize(("way", "load"), [("folder", LOAD), ("gloo", "stepcredit_receive")])
def test_weights_come_before_room_for_keys_and_values(policy, fakes, tmp_path, way, load):
    """In every round, to two servers; and nobody is asked for samples who is asleep."""
    two = fakes(), fakes()
    with sleeper(policy, *two, way=way) as sampler:
        for one in two:
            assert steps(one) == [load]  # awake at first
        for number in range(2):
            sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
            sampler.sleep()
            other = bigger(policy) if number else policy
            sampler.sync(other)
            sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
            for one in two:
                order = [step for step in steps(one) if step != COMPLETIONS]
                assert order == [f"{SLEEP}?level=2", WEIGHTS, load, CACHE]
                assert has(one, other, tmp_path / f"{number}{one.port}")


@pytest.mark.parametrize("level", ["1", "2"])
def test_whoever_samples_wakes_them(policy, fake, level):
    """Between an iteration's samples and its update, as an estimator that samples would: with the same weights."""
    with sleeper(policy, fake, level=level) as sampler:
        before = ids(sampler.sample(PROMPTS, 2, PARAMS, SEEDS))
        sampler.sleep()
        steps(fake)
        assert ids(sampler.sample(PROMPTS, 2, PARAMS, SEEDS)) == before
        assert steps(fake) == [WEIGHTS, LOAD, CACHE, COMPLETIONS]
        sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
        assert steps(fake) == [COMPLETIONS]


def test_off_leaves_them_awake(policy, fake):
    for level in ("auto", "off"):
        with sleeper(policy, fake, level=level) as sampler:
            sampler.sleep()
            sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
        assert not [step for step in steps(fake) if step.startswith((SLEEP, WAKE))]


@pytest.mark.parametrize("level", ["off", "2"])
def test_one_that_a_killed_run_left_asleep_is_woken(policy, fake, level):
    fake.asleep, fake.spoilt = {"weights", "kv_cache"}, True
    with sleeper(policy, fake, level=level) as sampler:
        sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
        assert steps(fake) == [WEIGHTS, LOAD, CACHE, COMPLETIONS]


def test_one_that_goes_down_asleep_and_comes_back(policy, fakes):
    first, second = fakes(), fakes()
    with sleeper(policy, first, second) as sampler:
        sampler.sleep()
        first.fail(RESET, [drop])  # its weights are awake and its keys and values are not
        sampler.sync(policy)  # the other goes on
        assert first.asleep == {"kv_cache"} and not second.asleep
        sampler.sample(PROMPTS * 5, 2, PARAMS, range(20))
        assert not first.asleep and not second.asleep
        assert [step for step in steps(first) if step != COMPLETIONS][-3:] == [WEIGHTS, LOAD, CACHE]


def test_one_that_cannot_sleep(policy, fake):
    fake.can_sleep = False
    with sleeper(policy, fake) as sampler, pytest.raises(UserError, match=r"--enable-sleep-mode.*sleep off") as error:
        sampler.sleep()
    assert "sleep mode is not enabled" in str(error.value)


def test_one_without_development_endpoints_is_awake(policy, fakes):
    """Adapters need none of them."""
    fake, adapted = fakes(), load_policy("embedded", "cpu")
    fake.development = False
    add_adapters(adapted, 4, 8.0, [], seed=0)
    with sleeper(adapted, fake, level="off") as sampler:
        sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
    with sleeper(adapted, fake, level="1") as sampler, pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        sampler.sleep()


def test_adapters_are_given_to_a_base_that_is_awake(fake):
    adapted = load_policy("embedded", "cpu")
    add_adapters(adapted, 4, 8.0, [], seed=0)
    with sleeper(adapted, fake, level="1") as sampler:
        sampler.sleep()
        sampler.sync(adapted)
        sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
        load = "/v1/load_lora_adapter"
        assert steps(fake) == [load, f"{SLEEP}?level=1", WEIGHTS, load, CACHE, COMPLETIONS]


def test_a_run_lets_its_server_sleep_while_it_learns(fakes, tmp_path, monkeypatch):
    """Two iterations and the evaluations between: asleep in every pass of the trainer, awake in every request."""
    fake = fakes(model=True)
    passes: list[bool] = []
    forward = Policy.forward

    def watched(self, *given, **more):
        passes.append(fake.asleep == {"weights", "kv_cache"})
        return forward(self, *given, **more)

    assert train(fake, tmp_path / "plain", "--group-size", "4", "--eval-every", "1") in (0, 1)
    fake.version, fake.order = "", []
    monkeypatch.setattr(Policy, "forward", watched)
    options = ["--group-size", "4", "--eval-every", "1", "--sampler.server.sleep", "2"]
    assert train(fake, tmp_path / "run", *options) in (0, 1)
    loading = passes.index(True)
    assert not any(passes[:loading]) and all(passes[loading:]) and len(passes) > loading + 3
    assert steps(fake) == [LOAD, COMPLETIONS, *[f"{SLEEP}?level=2", WEIGHTS, LOAD, CACHE, COMPLETIONS] * 2]
    for one, two in zip(rows(tmp_path / "plain"), rows(tmp_path / "run"), strict=True):
        assert one.get("reward/mean") == two.get("reward/mean") and one.get("eval/accuracy") == two.get("eval/accuracy")


def test_the_extension_says_the_type_of_its_weights():
    class Worker(Extension):
        device = torch.device("cpu")
        parallel_config = type("Config", (), {"world_size": 1, "data_parallel_size": 1})
        model_config = type("Config", (), {"dtype": torch.float16})

    assert Worker().stepcredit_place("/")["dtype"] == "float16"
