"""Answers that are cut short, refusals, servers that go down, come back or do not fit."""

import itertools
import re
import threading
import time

import pytest
from fake_server import (
    COMPLETIONS,
    PARAMS,
    PROMPTS,
    RESET,
    RPC,
    SEEDS,
    changed,
    cut_in_half,
    drop,
    ids,
    remote,
    sampling,
    status,
)

from stepcredit.errors import UserError
from stepcredit.run.interrupt import Interrupted
from stepcredit.samplers.remote import pool, weights

SHORT = {
    "completions": (changed(lambda choices: choices.pop()), "3 completions instead of 4"),
    "no choices": (lambda found: (200, b'{"choices": null}'), "0 completions instead of 4"),
    "logprobs": (changed(lambda choices: choices[1]["logprobs"]["token_logprobs"].pop()), "was cut short"),
    "no logprobs": (changed(lambda choices: choices[1].update(logprobs=None)), "was cut short"),
    "a logprob": (
        changed(lambda choices: choices[1]["logprobs"]["token_logprobs"].__setitem__(0, None)),
        "was cut short",
    ),
    "no ids": (changed(lambda choices: choices[1].update(token_ids=None)), "0 tokens"),
    "finish": (changed(lambda choices: choices[1].update(finish_reason="abort")), "ended by 'abort'"),
    "no finish": (changed(lambda choices: choices[1].update(finish_reason=None)), "ended by 'None'"),
    "early length": (
        changed(lambda choices: [one.update(finish_reason="length") for one in choices]),
        "ended by 'length'",
    ),
    "no stop id": (changed(lambda choices: [one.update(finish_reason="stop") for one in choices]), "ended by 'stop'"),
    "json": (cut_in_half, "an answer that was cut short"),
    "no object": (lambda found: (200, b"[1, 2]"), "an answer that was cut short"),
    "nothing": (lambda found: (200, b""), "0 completions"),
    "error": (status(500), "failed (500)"),
    "overloaded": (status(503), "failed (503)"),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_reply_that_is_cut_short_is_asked_for_again(policy, fake, name, caplog):
    fault, why = SHORT[name]
    with sampling(policy, fake, patience_s=0.2) as sampler:
        right = sampler.sample(PROMPTS[:2], 4, PARAMS, SEEDS[:2])
        assert {one.finish for group in right for one in group} == {"stop", "length"}
        caplog.clear()
        fake.fail(COMPLETIONS, [fault] * 2)
        assert sampler.sample(PROMPTS[:2], 4, PARAMS, SEEDS[:2]) == right
        assert why in caplog.text and fake.url in caplog.text
        fake.fail(COMPLETIONS, itertools.repeat(fault))
        asked = len(fake.requests)
        with pytest.raises(UserError, match=r"no answer for 0\.2 s") as error:
            sampler.sample(PROMPTS[:2], 4, PARAMS, SEEDS[:2])
    assert why in str(error.value) and fake.url in str(error.value)
    assert 6 <= len(fake.requests) - asked <= 16  # two requests, and pauses of 0.01, 0.02, 0.04, 0.08 ... s


def test_patience_starts_with_the_first_failure(policy, fake):
    """An answer that was long in coming, and failed, is asked for again all the same."""
    with sampling(policy, fake, patience_s=0.2) as sampler:
        fake.delay = 0.3
        fake.fail(COMPLETIONS, [status(500)])
        assert len(sampler.sample(PROMPTS[:1], 4, PARAMS, [1])[0]) == 4


def test_a_server_that_only_fails_does_not_keep_others_from_answering(policy, fakes):
    bad, good = fakes(), fakes()
    bad.fail(COMPLETIONS, itertools.repeat(status(500)))
    with sampling(policy, bad, good, patience_s=1.0) as sampler:
        assert len(sampler.sample(PROMPTS[:1], 2, PARAMS, [1])[0]) == 2


def test_a_refusal_ends_at_once(policy, fake, monkeypatch):
    """Also when another request is still being tried; that one is given up."""
    monkeypatch.setattr(pool, "FIRST_PAUSE_S", 5.0)
    monkeypatch.setattr(pool, "LONGEST_PAUSE_S", 5.0)
    with sampling(policy, fake, patience_s=30.0) as sampler:
        fake.fail(COMPLETIONS, [status(500), status(400, "too long")])
        started = time.monotonic()
        with pytest.raises(UserError, match=r"completions refuses \(too long\)"):
            sampler.sample(PROMPTS[:2], 2, PARAMS, [1, 2])
        while any("Executor" in thread.name for thread in threading.enumerate()):
            assert time.monotonic() - started < 4
            time.sleep(0.01)
        assert len(fake.paths(COMPLETIONS)) == 2
        assert not any(one.waiting for one in sampler.pool.servers)


def test_a_run_can_be_stopped_while_no_server_answers(policy, fake):
    def stop(_: int) -> None:
        if len(fake.paths(COMPLETIONS)) > 3:
            raise Interrupted

    with sampling(policy, fake, patience_s=30.0) as sampler:
        sampler.on_progress = stop
        fake.fail(COMPLETIONS, itertools.repeat(status(500)))
        with pytest.raises(Interrupted):
            sampler.sample(PROMPTS, 2, PARAMS, SEEDS)


def test_a_server_that_goes_down_in_the_middle(policy, fakes, caplog):
    """The others take over; when it is back it has the weights before it is used."""
    first, second = fakes(), fakes()
    with sampling(policy, first, second) as sampler:
        alone = ids(sampler.sample(PROMPTS, 2, PARAMS, SEEDS))
        first.fail(COMPLETIONS, itertools.repeat(drop))
        first.fail("/health", itertools.repeat(status(503)))
        caplog.clear()
        assert ids(sampler.sample(PROMPTS, 2, PARAMS, SEEDS)) == alone
        assert f"{first.url} does not answer" in caplog.text and "trying again" in caplog.text
        first.stop()
        sampler.sync(policy)
        assert first.url in caplog.text and "gets the weights when it is back" in caplog.text
        assert ids(sampler.sample(PROMPTS, 2, PARAMS, SEEDS)) == alone
        first.start()
        first.load_delay, second.delay = 0.2, 0.02
        sampler.sample(PROMPTS * 10, 2, PARAMS, range(40))
        assert f"{first.url} is back" in caplog.text
        version = sampler.weights.version
        assert [taken for _, taken in first.loads] == [version] and version.endswith("-2")
        assert first.served and set(first.served) == {sampler.weights.version}  # not one before the weights were there
        # Which version, in which type, load, forget.
        assert first.paths(RPC, RESET, COMPLETIONS)[:4] == [RPC, RPC, RPC, RESET]


def test_the_only_server_goes_down_and_comes_back(policy, fake, caplog):
    with sampling(policy, fake) as sampler:
        right = ids(sampler.sample(PROMPTS, 2, PARAMS, SEEDS))
        fake.stop()
        thread = threading.Timer(0.3, fake.start)
        thread.start()
        assert ids(sampler.sample(PROMPTS, 2, PARAMS, SEEDS)) == right
        thread.join()
    assert set(fake.served) == {sampler.weights.version} and "is back" in caplog.text


@pytest.mark.parametrize("name", ["policy", "another"])
def test_a_server_that_was_started_anew_between_two_calls(policy, fake, name, caplog):
    """Nobody noticed that it was down; its weights are those of the start. It may call the model otherwise now."""
    with sampling(policy, fake) as sampler:
        sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
        fake.stop()
        fake.name = name
        fake.start()
        assert fake.version == ""
        sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
    assert set(fake.served) == {sampler.weights.version} and f"{fake.url} was started anew" in caplog.text


def test_no_answer_at_all_ends_with_the_address(policy, fake):
    with sampling(policy, fake, patience_s=0.3) as sampler:
        fake.stop()
        with pytest.raises(UserError, match=re.escape(fake.url)):
            sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
        fake.start()


WRONG = {
    "vocabulary": ("/detokenize", lambda found: (200, b'{"prompt": "another"}'), "serves 'policy'.* vocabulary"),
    "broken detokenize": ("/detokenize", status(500), "detokenize failed"),
    "no extension": (RPC, status(500, "has no attribute"), "worker-extension-cls"),
    "no such method": (RPC, status(400, "unknown"), "worker-extension-cls"),
    "no development": (RPC, status(404), "VLLM_SERVER_DEV_MODE=1"),
    "half a development": (RESET, status(404), "VLLM_SERVER_DEV_MODE=1"),
    "cut rpc": (RPC, cut_in_half, "cut short"),
    "not loaded": (RPC, lambda found: (200, b'{"results": ["", ""]}'), "has not taken over the weights"),
    "one worker not": (RPC, lambda found: (200, b'{"results": ["1", ""]}'), "has not taken over the weights"),
    "no results": (RPC, lambda found: (200, b"{}"), "has not taken over the weights"),
    "no vllm": ("/v1/models", status(404, "<html>"), "does not answer as a vLLM server does"),
    "no models": ("/v1/models", lambda found: (200, b'{"data": []}'), "does not answer as a vLLM server does"),
    "a list": ("/v1/models", lambda found: (200, b"[1]"), "does not answer as a vLLM server does"),
}


@pytest.mark.parametrize("name", WRONG)
def test_servers_that_do_not_fit_are_refused(policy, fake, name):
    path, fault, why = WRONG[name]
    fake.fail(path, itertools.repeat(fault))
    with pytest.raises(UserError, match=why) as error:
        remote(policy, [fake.url])
    assert fake.url in str(error.value)
    del error
    assert not list(weights.MEMORY.iterdir())  # no folder is left


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://127.0.0.1:1", "http://127.0.0.1:port", "http://"])
def test_nothing_listens_there(policy, url):
    with pytest.raises(UserError, match=re.escape(url) if url != "http://" else "http") as error:
        remote(policy, [url])
    assert "does not answer as a vLLM server does" in str(error.value)
