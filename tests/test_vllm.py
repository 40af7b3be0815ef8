"""The vLLM sampler and what belongs to it, against a server in a thread that answers as vLLM does."""

import copy
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import is_near
from safetensors.torch import load_file
from tiny_models import fresh
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.errors import UserError
from stepcredit.estimators.frozen import OldPolicy
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.learn.adapters import add_adapters
from stepcredit.learn.placement import WHOLE, full_state
from stepcredit.losses.objective import Objective, importance_weights
from stepcredit.policy.forward import Policy, score
from stepcredit.policy.loading import checkpoint_tensors, load_policy, save_policy
from stepcredit.run.build import build_models, build_parts
from stepcredit.run.interrupt import Interrupted
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.remote import launch, pool, transfer, weights
from stepcredit.samplers.remote.dialect import Start
from stepcredit.samplers.remote.launch import LocalServer
from stepcredit.samplers.remote.options import ServerOptions
from stepcredit.samplers.remote.sampler import RemoteSampler
from stepcredit.samplers.remote.server import stepcredit_worker
from stepcredit.samplers.remote.server.stepcredit_worker import Extension
from stepcredit.samplers.remote.transfer import TransferError
from stepcredit.samplers.remote.vllm import VLLM, lora_args
from stepcredit.samplers.table import build_sampler
from stepcredit.samplers.transformers import TransformersSampler

COMPLETIONS, RPC, RESET = "/v1/completions", "/collective_rpc", "/reset_prefix_cache"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
STOP = 2
PARAMS = SamplingParams(max_new_tokens=6)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
SEEDS = [3, 4, 5, 6]

Reply = tuple[int, bytes]
Fault = Callable[[Reply], Reply]


class Drop(Exception):
    """Close the connection without an answer."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else {}
        try:
            status, content = self.server.fake.reply(self.path.split("?")[0], body)
        except Drop:
            return
        except RuntimeError as error:  # as vLLM tells of a worker's
            status, content = 500, json.dumps({"error": str(error)}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *_) -> None:
        pass


class Listener(ThreadingHTTPServer):
    request_queue_size = 128
    fake: "Fake"

    def handle_error(self, *_) -> None:
        pass  # the other end has gone


class Worker(Extension):
    """Our part of a worker, on a model runner that keeps what it is given.

    Attributes:
        given: the tensors of the last load.
        fault, late: raised in the middle of a load, or at its end.
    """

    device = torch.device("cpu")
    parallel_config = SimpleNamespace(world_size=2, data_parallel_size=1)

    def __init__(self, fake: "Fake") -> None:
        self.fake, self.model_runner, self.given, self.fault, self.late = fake, self, {}, None, None
        self.place: dict = {}

    def stepcredit_place(self, folder: str) -> dict:
        return super().stepcredit_place(folder) | self.place

    def get_model(self) -> torch.nn.Module:
        return torch.nn.Module()

    def reload_weights(self, weights_path: str = "", weights_iterator: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
        self.given = load_file(Path(weights_path) / "model.safetensors") if weights_path else {}
        for name, tensor in weights_iterator:
            self.given[name] = tensor.clone()
            if self.fault:
                raise self.fault
        if self.late:
            raise self.late
        if self.fake.sampler and self.fake.takes and self is self.fake.workers[0]:
            with self.fake.lock:
                self.fake.sampler.policy.model.load_state_dict(self.given, strict=False)
                self.fake.sampler.kept.clear()


class Fake:
    """A server without vLLM; its completions follow from their seeds, or are a model's.

    Attributes:
        faults: by path, what happens to the next replies.
        requests: path and body of each.
        served: the version of the weights at each completion request.
        workers: two, as of a server with tensor parallelism.
        loads: (folder, or entries of a broadcast, and version) of each load.
        delay: seconds that a completion request takes; `most` is how many there were at once.
        takes: False: says that it has loaded weights, and has not.
        answers: of its workers that are passed on; of data parallel ones 1.
    """

    def __init__(self, policy: Policy, model: bool = False) -> None:
        self.tokenizer = policy.tokenizer
        self.sampler = TransformersSampler(load_policy("embedded", "cpu")) if model else None
        self.port, self.delay, self.load_delay, self.takes, self.name = 0, 0.0, 0.0, True, "policy"
        self.answers = 2
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        """As a process that is started anew, under the address that it had."""
        self.faults: dict[str, Iterator[Fault]] = {}
        self.requests: list[tuple[str, dict]] = []
        self.loads: list[tuple[str, str]] = []
        self.served: list[str] = []
        self.adapters: dict[str, str] = {}  # by name, their folder
        self.workers = [Worker(self), Worker(self)]
        self.seen, self.queries, self.hits, self.now, self.most = set(), 0, 0, 0, 0
        self.listener = Listener(("127.0.0.1", self.port), Handler)
        self.listener.fake, self.port = self, self.listener.server_port
        threading.Thread(target=self.listener.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.listener.shutdown()
        self.listener.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def paths(self, *wanted: str) -> list[str]:
        return [path for path, _ in self.requests if path in wanted]

    def fail(self, path: str, faults: Iterable[Fault]) -> None:
        self.faults[path] = iter(faults)

    def reply(self, path: str, body: dict) -> Reply:
        with self.lock:
            self.requests.append((path, body))
            fault = next(self.faults.get(path, iter(())), None)
        answers = {
            "/health": lambda _: b"",
            "/v1/models": lambda _: {"data": [{"id": name} for name in (self.name, *self.adapters)]},
            LOAD: lambda body: self.adapters.update({body["lora_name"]: body["lora_path"]}) or b"Success",
            UNLOAD: lambda body: self.adapters.pop(body["lora_name"]).encode(),
            "/detokenize": lambda body: {"prompt": self.tokenizer.decode(body["tokens"])},
            "/metrics": lambda _: self.metrics().encode(),
            COMPLETIONS: self.completions,
            RPC: self.rpc,
            RESET: self.reset,
        }
        if path not in answers or body.get("model", self.name) not in (self.name, *self.adapters):
            return 404, b"not found"
        content = answers[path](body)
        found = 200, content if isinstance(content, bytes) else json.dumps(content).encode()
        return fault(found) if fault else found

    def completions(self, body: dict) -> dict:
        with self.lock:
            self.served.append(self.version or body["model"])
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.delay)
        with self.lock:
            prompt = tuple(body["prompt"])
            self.queries += len(prompt)
            self.hits += len(prompt) if prompt in self.seen else 0
            self.seen.add(prompt)
            drawn = self.sampled(body) if self.sampler else [made_up(body, number) for number in range(body["n"])]
            self.now -= 1
        choices = [
            {
                "index": index,
                "text": "",
                "token_ids": segment.token_ids,
                "logprobs": {"token_logprobs": segment.columns["rollout_logprobs"]},
                "finish_reason": segment.finish,
            }
            for index, segment in enumerate(drawn)
        ]
        return {"choices": choices[::-1]}

    def sampled(self, body: dict) -> list[Segment]:
        params = SamplingParams(body["temperature"], body["top_p"], max(0, body["top_k"]), body["max_tokens"])
        return self.sampler.sample([body["prompt"]], body["n"], params, [body["seed"]])[0]

    @property
    def version(self) -> str:
        return self.workers[0].stepcredit_version

    @version.setter
    def version(self, version: str) -> None:
        for worker in self.workers:
            worker.stepcredit_taken = worker.stepcredit_version = version

    def rpc(self, body: dict) -> dict:
        method, args = body["method"], body["args"]
        if method in ("stepcredit_load", "stepcredit_receive"):
            self.loads.append(tuple(args[-2:]))
            time.sleep(self.load_delay)
        with ThreadPoolExecutor(len(self.workers)) as pool:
            answers = [pool.submit(getattr(worker, method), *args) for worker in self.workers]
            return {"results": [answer.result() for answer in answers][: self.answers]}

    def reset(self, _: dict) -> bytes:
        self.seen.clear()
        return b""

    def metrics(self) -> str:
        rows = [
            "# TYPE vllm:prefix_cache_queries_total counter",
            f'vllm:prefix_cache_queries_total{{engine="0",model_name="policy"}} {self.queries - 1:.1f}',
            'vllm:prefix_cache_queries_total{engine="1",model_name="policy"} 1.0',
            'vllm:prefix_cache_queries_created{engine="0"} 1.7e+09',
            f'vllm:prefix_cache_hits_total{{engine="0",model_name="policy"}} {self.hits:.1f}',
        ]
        return "\n".join(rows) + "\n"


def made_up(body: dict, number: int) -> Segment:
    """A completion that depends on the seed as vLLM's do: completion i of a request has the request's plus i."""
    chance = random.Random(body["seed"] + number)
    stops = chance.random() < 0.5
    ids = [chance.randint(20, 40) for _ in range(body["max_tokens"])]
    if stops:
        ids = [*ids[: chance.randrange(body["max_tokens"])], body["stop_token_ids"][0]]
    logprobs = [-chance.random() for _ in ids]
    return Segment(ids, finish="stop" if stops else "length", columns={"rollout_logprobs": logprobs})


def status(code: int, text: str = "no") -> Fault:
    return lambda _: (code, text.encode())


def drop(_: Reply) -> Reply:
    raise Drop


def cut_in_half(found: Reply) -> Reply:
    return found[0], found[1][: len(found[1]) // 2]


def changed(change: Callable[[list[dict]], object]) -> Fault:
    """Change the choices of a reply."""

    def fault(found: Reply) -> Reply:
        answer = json.loads(found[1])
        change(answer["choices"])
        return found[0], json.dumps(answer).encode()

    return fault


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("embedded", "cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path_factory):
    """Short pauses, and a memory of its own."""
    monkeypatch.setattr(weights, "MEMORY", tmp_path_factory.mktemp("memory"))
    monkeypatch.setattr(pool, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(pool, "LONGEST_PAUSE_S", 0.1)


@pytest.fixture
def fakes(policy):
    """Servers, made when they are asked for."""
    made: list[Fake] = []

    def make(**options) -> Fake:
        made.append(Fake(policy, **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def fake(fakes) -> Fake:
    return fakes()


def remote(
    policy: Policy,
    urls: list[str],
    way: str = "auto",
    folder: Path | None = None,
    patience_s: float = 300.0,
    **more,
) -> RemoteSampler:
    options = ServerOptions(transfer=way, folder=None if folder is None else str(folder), patience_s=patience_s)
    return RemoteSampler(VLLM(), policy, urls, options, **more)


@contextmanager
def sampling(policy: Policy, *fakes: Fake, patience_s: float = 5.0, **options) -> Iterator[RemoteSampler]:
    with closing(remote(policy, [one.url for one in fakes], patience_s=patience_s, **options)) as sampler:
        yield sampler


def ids(groups: list[list[Segment]]) -> list[list[list[int]]]:
    return [[list(segment.token_ids) for segment in group] for group in groups]


# ---------------------------------------------------------------------- requests and answers


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


# ---------------------------------------------------------------------- what goes wrong

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
            assert time.monotonic() - started < 2
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
        assert first.paths(RPC, RESET, COMPLETIONS)[:3] == [RPC, RPC, RESET]


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


# ---------------------------------------------------------------------- weights


def test_weights_are_passed_on_in_a_folder(policy, fake, tmp_path):
    """It loads as any model; the cache is emptied afterwards; the one before is gone, and nothing else."""
    (tmp_path / "kept").write_text("not ours")
    other = load_policy("embedded", "cpu")
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    with sampling(policy, fake, folder=tmp_path) as sampler:
        # Which version, where it is, load, forget, commit, which version.
        assert fake.paths(RPC, RESET) == [RPC, RPC, RPC, RESET, RPC, RPC]
        first = Path(fake.loads[0][0])
        assert first.is_dir() and first.parents[1] == tmp_path
        assert first.parent.stat().st_mode & 0o777 == 0o755  # the server may be another user's
        sampler.sync(other)
        assert fake.paths(RPC, RESET) == [RPC, RPC, *[RPC, RESET, RPC, RPC] * 2]
        methods = [body["method"] for path, body in fake.requests if path == RPC]
        assert methods[-3:] == ["stepcredit_load", "stepcredit_commit", "stepcredit_loaded"]
        second, version = fake.loads[1]
        assert version == sampler.weights.version and version.endswith("-2") and not first.exists()
        assert len(AutoTokenizer.from_pretrained(second)) == len(policy.tokenizer)
        loaded = AutoModelForCausalLM.from_pretrained(second, dtype=torch.float32).state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in other.model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_weights_are_in_memory_and_go_with_the_sampler(policy, fake):
    with sampling(policy, fake) as sampler:
        assert list(weights.MEMORY.iterdir()) == [sampler.weights.folder]
        assert sampler.weights.folder.stat().st_mode & 0o077 == 0
        sampler.sync(policy)
        assert sampler.weights.folder.stat().st_mode & 0o077 == 0
        assert Path(fake.loads[1][0]).parent == sampler.weights.folder
    assert not list(weights.MEMORY.iterdir())


def test_only_the_first_process_writes(policy, fakes, tmp_path):
    """The others know its folder, so that each can bring a server up to date."""

    class Other:
        main = False

        def first(self, _: Callable) -> str | Path:
            return next(answers)

    fake, theirs = fakes(), fakes()
    with sampling(policy, fake, folder=tmp_path) as sampler:
        theirs.version = sampler.weights.version
        answers = iter((sampler.weights.token, sampler.weights.folder, ["folder"]))
        with sampling(policy, theirs, ranks=Other(), folder=tmp_path) as second:
            assert not theirs.loads
            theirs.version = ""
            second.sample(PROMPTS, 2, PARAMS, SEEDS)
            assert [Path(folder) for folder, _ in theirs.loads] == [sampler.weights.folder / sampler.weights.version]
        assert (sampler.weights.folder / sampler.weights.version).is_dir()


# ---------------------------------------------------------------------- weights by broadcast


JOIN_S = 60.0  # a TCPStore looks up names, and where name servers do not answer that takes seconds


def bigger(policy: Policy) -> Policy:
    """Other weights."""
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    return other


def has(fake: Fake, policy: Policy, folder: Path) -> bool:
    """Whether all workers of a server were given what a saved model holds."""
    save_policy(policy, folder)
    saved = load_file(folder / "model.safetensors")
    return all(
        worker.given.keys() == saved.keys() and all(torch.equal(worker.given[name], saved[name]) for name in saved)
        for worker in fake.workers
    )


@pytest.mark.parametrize("chunk", [1, 1 << 14, 1 << 28])
def test_weights_by_broadcast(policy, fakes, tmp_path, monkeypatch, chunk):
    """The tensors that a folder would hold, to all workers of all servers, and nothing is written."""
    monkeypatch.setitem(transfer.CHUNK, "gloo", chunk)
    first, second = fakes(), fakes()
    with sampling(policy, first, second, way="gloo", patience_s=JOIN_S) as sampler:
        assert has(first, policy, tmp_path / "a") and has(second, policy, tmp_path / "a")
        other = bigger(policy)
        sampler.sync(other)
        assert has(first, other, tmp_path / "b") and has(second, other, tmp_path / "b")
        assert [path.name for path in sampler.weights.folder.iterdir()] == ["lock"]
        assert {first.version, second.version} == {sampler.weights.version}
        assert first.paths(RPC, RESET)[-4:] == [RPC, RESET, RPC, RPC]  # the group of before
        sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
    assert set(first.served + second.served) == {sampler.weights.version}


@pytest.mark.parametrize("family", ["qwen2", "llama", "mixtral", "qwen3_moe"])
def test_tensors_are_those_of_a_saved_model(family, tmp_path):
    """Experts one by one, as checkpoints have them, and a tied output layer not twice."""
    model = fresh(family)
    found = checkpoint_tensors(model, full_state(model))
    model.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)


def test_tensors_of_all_types_and_shapes():
    """Example: pieces of a chunk start where any type can be read."""
    given = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(5, 2, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "c": torch.randn(7),
    }
    entries = [(name, str(one.dtype).removeprefix("torch."), list(one.shape)) for name, one in given.items()]
    flat = torch.empty(sum(map(stepcredit_worker.room, entries)), dtype=torch.uint8)
    for name, piece in stepcredit_worker.pieces(flat, entries):
        piece.copy_(given[name])
    found = dict(stepcredit_worker.pieces(flat, entries))
    assert all(torch.equal(found[name], one) and found[name].dtype == one.dtype for name, one in given.items())


def placed(fake: Fake, **place: object) -> Fake:
    for worker in fake.workers:
        worker.place = place
    return fake


def test_the_way_of_the_weights(policy, fakes, caplog, monkeypatch):
    """Through the folder where the server sees it, by the network where not, between GPUs only if they are two."""
    caplog.set_level(logging.INFO, "stepcredit")
    near, far = fakes(), placed(fakes(), sees=False)
    with sampling(policy, near, far) as sampler:
        assert [one.way for one in sampler.pool.servers] == ["folder", "gloo"]
        assert len(near.loads) == len(far.loads) == 1
    assert f"weights go to {far.url} by gloo" in caplog.text
    with sampling(policy, placed(fakes(), gpu="GPU-1")) as sampler:
        assert sampler.pool.servers[0].way == "folder"  # the policy has none
    monkeypatch.setattr(weights, "gpu_of", lambda _: "GPU-1")
    with sampling(policy, placed(fakes(), gpu="GPU-1")) as sampler:
        assert sampler.pool.servers[0].way == "folder"  # the same
    tried: list[str] = []

    def refused(url: str, backend: str, *_: object) -> None:
        tried.append(backend)
        raise TransferError(f"{backend}: not today")

    monkeypatch.setattr(weights, "Transfer", refused)
    caplog.clear()
    with sampling(policy, placed(fakes(), gpu="GPU-2")) as sampler:
        assert sampler.pool.servers[0].way == "folder" and tried == ["nccl"]
    assert "by nccl: not today" in caplog.text
    with pytest.raises(UserError, match=r"sampler\.server\.folder.*gloo: not today"):
        remote(policy, [placed(fakes(), sees=False).url])


def test_ways_that_cannot_be(policy, fakes):
    adapted = load_policy("embedded", "cpu")
    add_adapters(adapted, 4, 8.0, [], seed=0)
    for one, way, why in [
        (policy, "nccl", "from GPU to GPU"),
        (adapted, "gloo", "adapters go through a folder"),
        (policy, "folder", "sampler.server.folder"),
    ]:
        with pytest.raises(UserError, match=why):
            remote(one, [placed(fakes(), sees=False).url], way=way)
        assert not list(weights.MEMORY.iterdir())


def test_a_server_that_is_started_anew_joins_again(policy, fake, tmp_path, caplog):
    with sampling(policy, fake, way="gloo", patience_s=JOIN_S) as sampler:
        fake.stop()
        fake.start()
        sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
        assert has(fake, policy, tmp_path / "a") and set(fake.served) == {sampler.weights.version}
        assert f"{fake.url} was started anew" in caplog.text
        other = bigger(policy)
        sampler.sync(other)
        assert has(fake, other, tmp_path / "b")


def test_a_server_that_ends_while_it_is_given_weights(policy, fakes, tmp_path, caplog, monkeypatch):
    """It is left alone, the other goes on; when it is back it is given them from the start."""
    monkeypatch.setitem(transfer.CHUNK, "gloo", 1 << 12)
    first, second = fakes(), fakes()
    with sampling(policy, first, second, way="gloo", patience_s=JOIN_S) as sampler:
        for worker in first.workers:
            worker.fault = RuntimeError("out of room")
        other = bigger(policy)
        sampler.sync(other)
        assert f"{first.url} has not got the weights" in caplog.text and "out of room" in caplog.text
        assert sampler.pool.servers[0].down and has(second, other, tmp_path / "a")
        assert first.version == ""  # neither those of before
        for worker in first.workers:
            worker.fault = None
        sampler.sample(PROMPTS * 4, 2, PARAMS, range(16))
        assert f"{first.url} is back" in caplog.text and has(first, other, tmp_path / "a")
        assert set(first.served + second.served) == {sampler.weights.version}


FAILURES = {
    "in the middle": ("fault", (0, 1), 2),
    "at the end": ("late", (0, 1), 2),
    "one worker": ("fault", (1,), 2),
    "one worker at the end": ("late", (1,), 2),
    "one that is not heard of": ("late", (1,), 1),
}


@pytest.mark.parametrize("raises", [False, True], ids=["says", "raises"])
@pytest.mark.parametrize("name", FAILURES)
def test_workers_that_fail_in_a_broadcast(policy, fakes, tmp_path, caplog, monkeypatch, name, raises):
    """Soon noticed and said, whatever fails when; nothing is sampled with what they have; it is tried again."""
    where, numbers, answers = FAILURES[name]
    monkeypatch.setitem(transfer.CHUNK, "gloo", 1 << 12)
    monkeypatch.setattr(Worker, "parallel_config", SimpleNamespace(world_size=1 if raises else 2, data_parallel_size=2))
    first, second = fakes(), fakes()
    first.answers = answers
    other = bigger(policy)
    with sampling(policy, second, first, way="gloo", patience_s=JOIN_S) as sampler:
        for number in numbers:
            setattr(first.workers[number], where, RuntimeError("out of room"))
        started = time.monotonic()
        sampler.sync(other)
        assert time.monotonic() - started < 10
        assert f"{first.url} has not got the weights" in caplog.text
        if not (raises and name == "one worker"):  # this server passes on that the other was left alone
            assert ("1 of 2 workers" if answers == 1 and not raises else "out of room") in caplog.text
        assert sampler.pool.servers[1].down and first.version != sampler.weights.version
        sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
        assert not first.served
        for number in numbers:
            setattr(first.workers[number], where, None)
        sampler.sample(PROMPTS * 4, 2, PARAMS, range(16))
        assert has(first, other, tmp_path / "a") and set(first.served) <= {sampler.weights.version}


@pytest.mark.parametrize(
    "name, raises",
    [
        ("at the end", False),
        ("at the end", True),
        ("one worker at the end", False),
        ("one worker at the end", True),
        ("one that is not heard of", True),
    ],
)
def test_workers_that_fail_to_load_a_folder(policy, fake, monkeypatch, name, raises):
    """That ends the run: what lies there will not change."""
    where, numbers, fake.answers = FAILURES[name]
    monkeypatch.setattr(Worker, "parallel_config", SimpleNamespace(world_size=1 if raises else 2, data_parallel_size=1))
    with sampling(policy, fake) as sampler:
        assert sampler.pool.servers[0].way == "folder"
        for number in numbers:
            setattr(fake.workers[number], where, RuntimeError("out of room"))
        with pytest.raises(UserError, match="out of room"):
            sampler.sync(policy)
        assert fake.version == ""


def test_a_folder_of_engines_that_are_not_heard_must_be_asked_for(policy, fakes, monkeypatch):
    """Several engines of several workers each."""
    monkeypatch.setattr(Worker, "parallel_config", SimpleNamespace(world_size=2, data_parallel_size=2))
    for way, taken in (("auto", "gloo"), ("folder", "folder")):
        with sampling(policy, fakes(), way=way, patience_s=JOIN_S) as sampler:
            assert sampler.pool.servers[0].way == taken


def test_a_start_at_which_no_server_takes_the_weights(policy, fake):
    for worker in fake.workers:
        worker.late = RuntimeError("out of room")
    with pytest.raises(UserError, match="out of room"):
        remote(policy, [fake.url], way="gloo")


@pytest.mark.parametrize("answer", [status(503), lambda _: (200, b'{"success": false}')], ids=["down", "in use"])
@pytest.mark.parametrize("way", ["folder", "gloo"])
def test_a_cache_that_is_not_emptied_is_emptied_before_the_server_is_used(policy, fake, caplog, way, answer):
    with sampling(policy, fake, way=way, patience_s=JOIN_S) as sampler:
        sampler.sample(PROMPTS, 1, PARAMS, SEEDS)
        assert fake.seen
        fake.fail(RESET, [answer])
        sampler.sync(bigger(policy))
        assert fake.version == "" and sampler.pool.servers[0].down
        fake.seen = {tuple(PROMPTS[1])}  # it was not emptied
        fake.served.clear()
        before = len(fake.paths(RESET))
        sampler.sample([PROMPTS[0]], 1, PARAMS, SEEDS[:1])
        assert len(fake.paths(RESET)) > before and fake.seen == {tuple(PROMPTS[0])}
        assert fake.served == [sampler.weights.version]


def test_two_trainers_of_one_server(policy, fake, tmp_path, caplog):
    """A worker takes weights from the one that it met last; the other notices, and meets it again."""
    with (
        sampling(policy, fake, way="gloo", patience_s=JOIN_S) as one,
        sampling(policy, fake, way="gloo", patience_s=JOIN_S),
    ):
        other = bigger(policy)
        one.sync(other)
        assert "another trainer" in caplog.text and one.pool.servers[0].down
        one.sample(PROMPTS, 1, PARAMS, SEEDS)
        assert has(fake, other, tmp_path / "a") and fake.version == one.weights.version


def test_the_gpu_is_the_one_that_a_sharded_policy_will_be_on(policy, fake):
    """It is on the CPU when the sampler is made."""
    with pytest.raises(UserError, match="nccl, which this torch does not have"):
        remote(policy, [fake.url], way="nccl", device=torch.device("cuda"))


def test_only_the_first_process_broadcasts(policy, fake, caplog):
    """Others wait until a server that was started anew has been given the weights."""

    class Other:
        main = False

        def first(self, _: Callable) -> object:
            return next(answers)

    with sampling(policy, fake, way="gloo", patience_s=JOIN_S) as sampler:
        answers = iter((sampler.weights.token, sampler.weights.folder, ["gloo"]))
        with sampling(policy, fake, ranks=Other(), way="gloo", patience_s=JOIN_S) as second:
            fake.stop()
            fake.start()
            later = threading.Timer(0.3, lambda: sampler.sample(PROMPTS, 1, PARAMS, SEEDS))
            later.start()
            second.sample(PROMPTS, 2, PARAMS, SEEDS)
            later.join()
    assert set(fake.served) == {sampler.weights.version} and len(fake.loads) == 1
    assert "waits for the first process" in caplog.text


def test_a_run_by_broadcast(policy, fakes, tmp_path):
    fake = placed(fakes(model=True), sees=False)
    assert train(fake, tmp_path / "run", "--group-size", "4") == 0
    assert all(row["sampler/logprob_diff_mean"] < 1e-4 for row in rows(tmp_path / "run")[1:])
    end = load_file(tmp_path / "run" / "checkpoints" / "000002" / "model.safetensors")
    served = fake.sampler.policy.model.state_dict()
    assert all(torch.equal(value, served[name]) for name, value in end.items())


def test_share_of_prompts_that_the_caches_had(policy, fakes):
    """Between one sync and the next, over all servers; what was before the run and a restart do not count."""
    first, second = fakes(), fakes()
    first.queries, first.hits = 1000, 900
    with sampling(policy, first, second) as sampler:

        def sample(prompt: list[int], times: int) -> None:
            for _ in range(times):
                sampler.sample([prompt], 1, PARAMS, [1])

        sample([5, 6, 7, 8], 4)  # one server has them all
        sampler.sync(policy)
        assert sampler.metrics == {"sampler/prefix_hits": 12 / 16}
        second.queries, second.hits = second.queries + 16, second.hits + 2
        sample([5, 6, 7, 8], 2)  # forgotten with the weights that it was of
        sampler.sync(policy)
        assert sampler.metrics == {"sampler/prefix_hits": (4 + 2) / (8 + 16)}
        first.queries = first.hits = 1
        second.queries, second.hits = second.queries + 10, second.hits + 5
        sampler.sync(policy)
        assert sampler.metrics == {"sampler/prefix_hits": 0.5}
        sampler.sync(policy)
        assert sampler.metrics == {}


# ---------------------------------------------------------------------- runs

TINY = ["--iterations", "2", "--train.problems-per-iteration", "3", "--eval.num-problems", "2", "--device", "cpu"]
TINY += ["--sampler.max-new-tokens", "32", "--sampler.name", "vllm"]


def train(fake: Fake, run: Path, *more: str) -> int:
    return main(["train", *TINY, "--sampler.server.urls", fake.url, "--run-dir", str(run), *more])


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run(policy, fakes, tmp_path):
    """Two iterations; the server has the weights of each, although it is started anew between them."""
    fake = fakes(model=True)

    def forget(found: Reply) -> Reply:
        fake.version = ""
        fake.sampler.policy.model.load_state_dict(policy.model.state_dict())
        return found

    fake.fail("/metrics", [lambda found: found, forget])  # it is looked at after each load
    assert train(fake, tmp_path / "run", "--group-size", "4", "--objective.importance", "token") == 0
    found = rows(tmp_path / "run")[1:]
    assert len(found) == 2
    for row in found:
        assert row["sampler/logprob_diff_mean"] < 1e-4 and abs(row["sampler/ratio"] - 1) < 1e-4
        assert row["policy/entropy"] > 0 and row["sampler/truncated"] == 0
        assert 0 <= row["sampler/prefix_hits"] < 1
    assert [version.rsplit("-", 1)[1] for _, version in fake.loads] == ["1", "2", "2", "3"]
    end = load_file(tmp_path / "run" / "checkpoints" / "000002" / "model.safetensors")
    served = fake.sampler.policy.model.state_dict()
    assert all(torch.equal(value, served[name]) for name, value in end.items())
    start = policy.model.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in end.items())
    assert not list(weights.MEMORY.iterdir())


def test_a_run_with_trees(fakes, tmp_path):
    fake = fakes(model=True)
    options = ["--algorithm", "treerpo", "--growth.num-branches", "2", "--growth.depth", "2", "--iterations", "1"]
    assert train(fake, tmp_path / "run", *options, "--objective.importance", "sequence") in (0, 1)
    assert rows(tmp_path / "run")[1]["sampler/logprob_diff_mean"] < 1e-4


def test_other_weights_end_a_run(fakes, tmp_path, capsys):
    """A server that says that it has the weights, and samples with others."""
    fake = fakes(model=True)
    fake.takes = False
    with torch.no_grad():
        for weight in fake.sampler.policy.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    assert train(fake, tmp_path / "run", "--group-size", "4") == 2
    error = capsys.readouterr().err
    mean, most, share = re.search(r"by ([\d.]+) nats on average \(at most ([\d.]+), (\d+)%", error).groups()
    assert 0.05 < float(mean) < float(most) and int(share) > 10
    assert "server has other weights" in error


def config(**server_options):
    return resolve({"sampler": {"name": "vllm", "server": server_options}})


def test_old_logprobs_and_entropy_come_from_the_trainer(policy):
    """Even where a step is exactly on-policy."""
    given = config(launch=True)
    assert set(build_models(given, build_parts(given), policy)) == {"old_logprobs"}
    ours = resolve({})
    assert build_models(ours, build_parts(ours), policy) == {}
    columns = {"rollout_logprobs": [-1.0, -2.0, -3.0]}
    forest = Forest.from_trees([Tree(Problem(), [1, 5], [Segment([7, 8, 2], columns=columns)])])
    found = OldPolicy(policy, 0.7, 1000).observe(forest)
    scores = score(policy, forest, 0.7, 1000)
    assert torch.equal(found.token["old_logprobs"], scores.logprobs)
    assert torch.equal(found.token["entropy"], scores.entropy) and bool((scores.entropy > 0).all())
    there = forest.with_token(entropy=torch.ones(3))
    assert OldPolicy(policy, 0.7, 1000).observe(there).token["entropy"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("options", [{}, {"urls": "http://127.0.0.1:1", "launch": True}])
def test_servers_or_one_of_its_own(policy, options):
    with pytest.raises(UserError, match=r"needs running servers .* not both"):
        build_sampler(config(**options), policy, WHOLE)


def test_adapters_are_models_of_their_own(fakes):
    """Of a new name after each update, the one before gone; a server that is started anew gets them again."""
    fake, adapted = fakes(), load_policy("embedded", "cpu")
    add_adapters(adapted, 4, 8.0, [], seed=0)
    with sampling(adapted, fake) as sampler:
        for _ in range(2):
            sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
            assert list(fake.adapters) == [sampler.weights.version] and set(fake.served) == {sampler.weights.version}
            folder = Path(fake.adapters[sampler.weights.version])
            assert (folder / "adapter_model.safetensors").is_file() and not list(folder.glob("model*"))
            fake.served.clear()
            sampler.sync(adapted)
        fake.stop()
        fake.start()
        sampler.sample(PROMPTS, 2, PARAMS, SEEDS)
        assert list(fake.adapters) == [sampler.weights.version]
    assert not fake.loads  # the base stays what it is


def test_a_server_that_takes_no_adapters(fakes):
    fake, adapted = fakes(), load_policy("embedded", "cpu")
    add_adapters(adapted, 4, 8.0, [], seed=0)
    fake.fail(LOAD, [status(400, "LoRA is not enabled")])
    with pytest.raises(UserError, match=r"refuses \(LoRA is not enabled\).*--enable-lora"), sampling(adapted, fake):
        pass


def test_weights_of_a_killed_run_go(policy, fake):
    """With the next run; those of a run that lives stay."""
    code = "import sys; from pathlib import Path; from stepcredit.samplers.remote import weights\n"
    code += "weights.MEMORY = Path(sys.argv[1]); print(weights.new_folder(None), flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(weights.MEMORY)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as dead, subprocess.Popen(command, **pipes) as alive:
        left, kept = Path(dead.stdout.readline().strip()), Path(alive.stdout.readline().strip())
        dead.kill()
        dead.wait()
        assert left.is_dir()
        with sampling(policy, fake) as sampler:
            assert not left.exists() and set(weights.MEMORY.iterdir()) == {sampler.weights.folder, kept}
        alive.stdin.close()


def test_ranks_that_vllm_takes():
    assert [lora_args(rank)[-1:] for rank in (0, 1, 8, 9, 512)] == [[], ["8"], ["8"], ["16"], ["512"]]
    with pytest.raises(UserError, match=r"lora.rank: .* up to rank 512"):
        lora_args(513)


# ---------------------------------------------------------------------- importance weights


def ratios(*values: float) -> dict[str, list[float]]:
    """Columns whose quotients are these."""
    return {"old_logprobs": [math.log(value) - 1 for value in values], "rollout_logprobs": [-1.0] * len(values)}


FLAT = [  # a completion that calls a tool, and one without
    Segment([1, 1], columns=ratios(2.0, 1.5), finish="cut"),
    Segment([1, 1], 0, sampled=False, columns=ratios(9.0, 0.1), finish="cut"),
    Segment([1], 1, columns=ratios(0.5), reward=1.0),
    Segment([1] * 3, columns=ratios(0.5, 0.5, 1.0), reward=0.0),
]
BRANCHING = [
    Segment([1, 1], columns=ratios(2.0, 0.75), finish="cut"),
    Segment([1], 0, columns=ratios(0.5), reward=1.0),
    Segment([1, 1], 0, columns=ratios(1.2, 1.0), reward=0.0),
]


def forest_of(segments: list[Segment]) -> Forest:
    return Forest.from_trees([Tree(Problem(), [1], segments)])


def test_importance_of_tokens():
    """Each by itself, at most the cap; 1 for tokens that nobody sampled."""
    is_near(importance_weights(forest_of(FLAT), False, 1.8), [1.8, 1.5, 1, 1, 0.5, 0.5, 0.5, 1])
    is_near(importance_weights(forest_of(FLAT), False, 9.0), [2, 1.5, 1, 1, 0.5, 0.5, 0.5, 1])
    is_near(importance_weights(forest_of(BRANCHING), False, 1.1), [1.1, 0.75, 0.5, 1.1, 1])


def test_importance_of_sequences():
    """Flat: the product over the completion, on all its tokens; in trees over the path to the segment's end."""
    forest = forest_of(FLAT)
    is_near(importance_weights(forest, True, 9.0)[forest.token_sampled], [1.5, 1.5, 1.5, 0.25, 0.25, 0.25])
    is_near(importance_weights(forest, True, 1.4)[forest.token_sampled], [1.4, 1.4, 1.4, 0.25, 0.25, 0.25])
    is_near(importance_weights(forest_of(BRANCHING), True, 1.6), [1.5, 1.5, 0.75, 1.6, 1.6])


def test_importance_in_the_objective():
    forest = forest_of(BRANCHING)
    forest = forest.with_token(advantages=torch.ones(5))
    plain = Objective(aggregate="token_mean").weights(forest)
    is_near(plain, [0.2] * 5)
    is_near(Objective(importance="token", importance_cap=1.1).weights(forest), [0.22, 0.15, 0.1, 0.22, 0.2])
    is_near(Objective(importance="sequence", importance_cap=1.6).weights(forest), [0.3, 0.3, 0.15, 0.32, 0.32])
    without = forest.without_token("rollout_logprobs")
    is_near(Objective(importance="token").weights(without), [0.2] * 5)


# ---------------------------------------------------------------------- a server of the run's own

SERVER = """
import json, os, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

child = subprocess.Popen(["sleep", "300"])

def end(*_):
    child.kill()
    child.wait()
    os._exit(1)

signal.signal(signal.SIGTERM, signal.SIG_IGN if "--stubborn" in sys.argv else end)
told = {"pids": [os.getpid(), os.getppid(), child.pid], "words": sys.argv[1:], "environment": dict(os.environ)}
Path(sys.argv[0]).with_name("told.json").write_text(json.dumps(told))
starting = [503, 503]

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if not starting:
            Path(sys.argv[0]).with_name("ready").touch()
        self.send_response(starting.pop() if starting else 200)
        self.end_headers()

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")


@pytest.fixture
def python(tmp_path) -> Path:
    """An interpreter that is a script, and stands for one with vLLM."""
    script, python = tmp_path / "server.py", tmp_path / "python"
    script.write_text(SERVER)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
    python.chmod(0o755)
    return python


def local(
    python: Path | str | None, folder: Path, processed: bool = False, port: int = 0, more: str = "--more"
) -> LocalServer:
    params = SamplingParams(temperature=0.7 if processed else 1.0)
    start = Start("a-model", "float32", params, str(python), port, args=[more, "1"])
    return LocalServer(VLLM(), start, folder / "log" / "server.log")


def told(folder: Path) -> dict:
    return json.loads((folder / "told.json").read_text())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def all_gone(pids: list[int], within: float = 5.0) -> bool:
    until = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


@linux
def test_close_ends_all_processes(python, tmp_path, monkeypatch, caplog):
    """And how the server is called: with what the worker extension needs, and not as one of torchrun's."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    caplog.set_level(logging.INFO)
    with closing(local(python, tmp_path, processed=True)) as server:
        found = told(tmp_path)
        assert (tmp_path / "ready").exists()
        assert all(map(alive, found["pids"])) and str(server.log_file) in caplog.text
        server.check()
    assert all_gone(found["pids"])
    words, environment = found["words"], found["environment"]
    assert words[:2] == ["-m", "vllm.entrypoints.openai.api_server"] and words[-2:] == ["--more", "1"]
    given = dict(itertools.pairwise(words))
    expected = {"--model": "a-model", "--dtype": "float32", "--host": "127.0.0.1", "--port": str(server.port)}
    expected |= {"--worker-extension-cls": "stepcredit_worker.Extension", "--logprobs-mode": "processed_logprobs"}
    assert given | expected == given
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(launch.SERVER), "elsewhere"]
    assert (launch.SERVER / "stepcredit_worker.py").is_file()
    assert environment["VLLM_SERVER_DEV_MODE"] == "1" and "RANK" not in environment


@linux
def test_nothing_stays_when_the_run_is_killed(python, tmp_path):
    code = "import sys, time; from pathlib import Path; from stepcredit.samplers.params import SamplingParams\n"
    code += "from stepcredit.samplers.remote.dialect import Start; from stepcredit.samplers.remote.vllm import VLLM\n"
    code += "from stepcredit.samplers.remote.launch import LocalServer\n"
    code += "start = Start('m', 'auto', SamplingParams(), sys.argv[1])\n"
    code += "one = LocalServer(VLLM(), start, Path(sys.argv[2]))\nprint('ready', flush=True)\n"
    code += "time.sleep(300)"
    words = [sys.executable, "-c", code, str(python), str(tmp_path / "log")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "ready\n"
        pids = told(tmp_path)["pids"]
        assert all(map(alive, pids))
        run.send_signal(signal.SIGKILL)
    assert all_gone(pids)


@linux
def test_a_server_of_its_own_that_ends_ends_the_run(policy, fake, python, tmp_path):
    """Without waiting for the patience to be over."""
    server = local(python, tmp_path)
    with sampling(policy, fake, patience_s=30.0, local=server) as sampler:
        pids = told(tmp_path)["pids"]
        os.kill(pids[0], signal.SIGTERM)
        assert server.process.wait(5) != 0
        assert all_gone(pids)
        fake.fail(COMPLETIONS, itertools.repeat(drop))
        with pytest.raises(UserError, match=f"the server has ended; its log is {re.escape(str(server.log_file))}"):
            sampler.sample(PROMPTS, 2, PARAMS, SEEDS)


@linux
@pytest.mark.parametrize("which", ["server", "child"])
def test_what_does_not_end_is_made_to(python, tmp_path, monkeypatch, which):
    """A server that takes no signals, and what one that died has left running."""
    folder = tmp_path / "server"
    folder.mkdir()
    text = (launch.SERVER / "supervise.py").read_text()
    assert "GRACE_S = 10.0" in text
    (folder / "supervise.py").write_text(text.replace("GRACE_S = 10.0", "GRACE_S = 0.5"))
    monkeypatch.setattr(launch, "SERVER", folder)
    with closing(local(python, tmp_path, more="--stubborn")) as server:
        pids, started = told(tmp_path)["pids"], time.monotonic()
        if which == "server":
            server.close()
            assert time.monotonic() - started > 0.5
        else:
            os.kill(pids[0], signal.SIGKILL)
        assert all_gone(pids)


@linux
def test_the_sampler_closes_its_server(policy, fake, python, tmp_path):
    with sampling(policy, fake, local=local(python, tmp_path)):
        pids = told(tmp_path)["pids"]
    assert all_gone(pids)


def test_a_port_in_use(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"sampler.server.port: {port} is in use"):
            local(None, tmp_path, port=port)


@pytest.mark.parametrize("python, why", [(None, "No module named"), ("no-such-python", "no-such-python")])
def test_no_vllm(python, why, tmp_path):
    """The error names the log and the reason."""
    with pytest.raises(UserError, match="the server has ended") as error:
        local(python or bare(tmp_path), tmp_path)
    assert str(tmp_path / "log" / "server.log") in str(error.value) and why in str(error.value)


def bare(folder: Path) -> Path:
    """This interpreter, without whatever is installed."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "$@"\n')
    python.chmod(0o755)
    return python
