"""A server in a thread that answers as vLLM does, and ways to use it: what the tests of remote samplers share."""

import copy
import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from stepcredit.cli.main import main
from stepcredit.forest.types import Segment
from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import load_policy, save_policy
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.remote.options import ServerOptions
from stepcredit.samplers.remote.sampler import RemoteSampler
from stepcredit.samplers.remote.server.stepcredit_worker import Extension
from stepcredit.samplers.remote.vllm import VLLM
from stepcredit.samplers.transformers import TransformersSampler

COMPLETIONS, RPC, RESET = "/v1/completions", "/collective_rpc", "/reset_prefix_cache"
SLEEP, WAKE, ASLEEP = "/sleep", "/wake_up", "/is_sleeping"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
STOP = 2
PARAMS = SamplingParams(max_new_tokens=6)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
SEEDS = [3, 4, 5, 6]

JOIN_S = 60.0  # a TCPStore looks up names, and where name servers do not answer that takes seconds
TINY = ["--iterations", "2", "--train.problems-per-iteration", "3", "--eval.num-problems", "2", "--device", "cpu"]
TINY += ["--sampler.max-new-tokens", "32", "--sampler.name", "vllm"]

Reply = tuple[int, bytes]
Fault = Callable[[Reply], Reply]


class Drop(Exception):
    """Close the connection without an answer."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else {}
        try:
            status, content = self.server.fake.reply(self.path, body)
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
    model_config = SimpleNamespace(dtype=torch.float32)

    def __init__(self, fake: "Fake") -> None:
        self.fake, self.model_runner, self.given, self.fault, self.late = fake, self, {}, None, None
        self.place: dict = {}

    def stepcredit_place(self, folder: str) -> dict:
        return super().stepcredit_place(folder) | self.place

    def get_model(self) -> torch.nn.Module:
        return torch.nn.Module()

    def reload_weights(self, weights_path: str = "", weights_iterator: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
        assert "weights" not in self.fake.asleep and (not self.fake.spoilt or "kv_cache" in self.fake.asleep)
        self.given = load_file(Path(weights_path) / "model.safetensors") if weights_path else {}
        for name, tensor in weights_iterator:
            self.given[name] = tensor.clone()
            if self.fault:
                raise self.fault
        if self.late:
            raise self.late
        self.fake.spoilt = False
        if self.fake.sampler and self.fake.takes and self is self.fake.workers[0]:
            with self.fake.lock:
                self.fake.sampler.policy.model.load_state_dict(self.given, strict=False)
                self.fake.sampler.prefix_cache.clear()


class Fake:
    """A server without vLLM; its completions follow from their seeds, or are a model's.

    Attributes:
        faults: by path, what happens to the next replies.
        requests: path and body of each.
        served: the version of the weights at each completion request.
        workers: two, as of a server with tensor parallelism.
        loads: (folder, or entries of a broadcast, and version) of each load.
        delay: seconds that a completion request takes; `most` is how many there were at once.
        asleep, spoilt: tags of what is asleep; weights were forgotten and not given again.
        development: has the endpoints of VLLM_SERVER_DEV_MODE; can_sleep: --enable-sleep-mode.
        order: what it was asked, methods of workers by their names.
        takes: False: says that it has loaded weights, and has not.
        answers: of its workers that are passed on; of data parallel ones 1.
    """

    def __init__(self, policy: Policy, model: bool = False) -> None:
        self.tokenizer = policy.tokenizer
        self.sampler = TransformersSampler(load_policy("embedded", "cpu")) if model else None
        self.port, self.delay, self.load_delay, self.takes, self.name = 0, 0.0, 0.0, True, "policy"
        self.answers = 2
        self.asleep, self.spoilt, self.can_sleep, self.development = set[str](), False, True, True
        self.order: list[str] = []
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

    def reply(self, full_path: str, body: dict) -> Reply:
        path, _, query = full_path.partition("?")
        with self.lock:
            self.order.append(full_path if path in (SLEEP, WAKE) else body.get("method") or path)
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
            SLEEP: lambda _: self.sleep(query),
            WAKE: lambda _: self.wake(query),
            ASLEEP: lambda _: {"is_sleeping": bool(self.asleep)},
        }
        if not self.development:
            answers = {name: answer for name, answer in answers.items() if name not in (SLEEP, WAKE, ASLEEP)}
        if path not in answers or body.get("model", self.name) not in (self.name, *self.adapters):
            return 404, b"not found"
        content = answers[path](body)
        found = 200, content if isinstance(content, bytes) else json.dumps(content).encode()
        return fault(found) if fault else found

    def sleep(self, query: str) -> bytes:
        """As one with --enable-sleep-mode; level 2 spoils the weights."""
        if not self.can_sleep:
            raise RuntimeError("sleep mode is not enabled")
        self.asleep = {"weights", "kv_cache"}
        if query == "level=2":
            self.spoilt = True
        return b""

    def wake(self, query: str) -> bytes:
        what = query.removeprefix("tags=")
        if what not in self.asleep:
            raise RuntimeError(f"{what} is awake")
        self.asleep.remove(what)
        return b""

    def completions(self, body: dict) -> dict:
        if self.asleep or self.spoilt:
            raise RuntimeError("asleep" if self.asleep else "the weights are gone")
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
        params = SamplingParams(
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=max(0, body["top_k"]),
            max_new_tokens=body["max_tokens"],
        )
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


def placed(fake: Fake, **place: object) -> Fake:
    for worker in fake.workers:
        worker.place = place
    return fake


def train(fake: Fake, run: Path, *more: str) -> int:
    return main(["train", *TINY, "--sampler.server.urls", fake.url, "--run-dir", str(run), *more])


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
