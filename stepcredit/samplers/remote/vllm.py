"""Sampling by vLLM servers: token ids in and out by HTTP, weights through a folder that they load or by broadcast.

A request is a prompt with all its completions. Servers are taken by how little they have to do; one that does not
answer is left alone and tried again, and gets the weights anew before it is used. Prompts that continue others are
computed from where they part, by the servers' prefix caches.
"""

import copy
import fcntl
import logging
import shutil
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import httpx
import torch
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.forest.types import Segment
from stepcredit.learn.adapters import has_adapters
from stepcredit.learn.placement import full_state
from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import checkpoint_tensors, save_policy
from stepcredit.processes.ranks import ALONE, Ranks
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.remote.launch import LocalServer
from stepcredit.samplers.remote.transfer import Transfer, TransferError

log = logging.getLogger("stepcredit")

Way = Literal["auto", "folder", "nccl", "gloo"]

MEMORY = Path("/dev/shm")
LOCKS: list[IO[bytes]] = []  # held open
PROBE = 64  # ids whose text is compared with the server's
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
IDLE_S = 2.0  # connections are kept; servers close theirs after 5 s
SPACING = 0xD1342543DE82EF95  # a server draws completion i with seed + i; odd, so that seeds stay apart and distinct
RPC, RESET = "/collective_rpc", "/reset_prefix_cache?reset_running_requests=true"
DEVELOPMENT = (RPC, RESET)  # paths of VLLM_SERVER_DEV_MODE
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}


ADAPTERS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
HINTS = {
    (RPC,): "; is it started with --worker-extension-cls (docs/vllm.md)?",
    ADAPTERS: "; is it started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (docs/vllm.md)?",
}


class Retry(Exception):
    """A request that may succeed when it is made again, here or elsewhere."""


@dataclass
class Server:
    """
    Attributes:
        waiting: requests that it has.
        down: it has not answered; it is asked again later.
        lock: of the one that asks.
        way: how it gets weights: "folder", or a backend of `Transfer`; empty: not yet decided.
        transfer: of a way that needs one.
    """

    url: str
    model: str = ""
    waiting: int = 0
    down: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    way: str = ""
    transfer: Transfer | None = None


@dataclass(frozen=True)
class Request:
    """
    Attributes:
        stop: ids that end a completion.
        full: the log-probabilities are of the full distribution.
        copies: of each completion that is asked for: vLLM takes greedy sampling for one at a time.
        over: set when nobody waits for the answer any more.
    """

    body: dict[str, Any]
    stop: frozenset[int]
    full: bool
    copies: int
    over: threading.Event


class VLLMSampler:
    """Samples with servers whose weights follow the policy's.

    Args:
        policy: whose vocabulary and stop ids hold, and whose weights are sent.
        urls: of the servers, such as http://127.0.0.1:8000.
        max_rows: completions in flight at once, over all servers.
        timeout_s: of a request.
        patience_s: how long a request that failed is tried again before the run ends.
        folder: weights are written below it for servers that see it. None: in memory where there is a /dev/shm.
        way: of the weights: "folder", "nccl" (from GPU to GPU), "gloo" (between any devices, over the network) or
            "auto": nccl where trainer and server have GPUs of their own, else the folder if the server sees it, else
            gloo.
        device: on which the policy will compute; None: where it is.
        ranks: the processes of the run; the first sends the weights.
        server: one of the run's own, to be ended with it.

    Attributes:
        metrics: of the time since the last `sync`.
    """

    def __init__(
        self,
        policy: Policy,
        urls: Sequence[str],
        max_rows: int = 256,
        timeout_s: float = 600.0,
        patience_s: float = 300.0,
        folder: Path | None = None,
        ranks: Ranks = ALONE,
        server: LocalServer | None = None,
        way: Way = "auto",
        device: torch.device | None = None,
    ) -> None:
        self.policy, self.max_rows, self.ranks, self.server = policy, max_rows, ranks, server
        self.timeout_s, self.patience_s = timeout_s, patience_s
        self.on_progress: Callable[[int], None] = lambda _: None
        self.metrics: dict[str, float] = {}
        limits = httpx.Limits(max_connections=None, keepalive_expiry=IDLE_S)
        connecting = httpx.Timeout(timeout_s, connect=10.0)
        self.client = httpx.Client(timeout=connecting, limits=limits, trust_env=False)  # no proxy stands between
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.lock, self.writing = threading.Lock(), threading.Lock()
        self.token, self.number = ranks.first(lambda: uuid.uuid4().hex[:8]), 0  # a server may know other runs
        self.adapted, self.way = has_adapters(policy), way
        self.state: dict[str, Tensor] = {}  # what servers are given; of the first process
        self._counted: dict[str, tuple[float, float]] = {}
        self.device = device or policy.device
        if way == "nccl" and self.device.type != "cuda":
            raise UserError("sampler.vllm.transfer: nccl goes from GPU to GPU, and the policy is on the CPU; take gloo")
        if self.adapted and way not in ("auto", "folder"):
            raise UserError(f"sampler.vllm.transfer: adapters go through a folder, not by {way}")
        for one in self.servers:
            try:
                self._check(one)
            except Retry as error:
                raise UserError(f"sampler.vllm.servers: {error}") from error
        self.folder = ranks.first(lambda: _new_folder(folder))
        self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True) if ranks.main else None
        try:
            self.sync(policy)  # now, because all processes take part, and some may have nothing to sample
        except BaseException:
            self.close()
            raise

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The model's own."""
        return tuple(self.policy.stop_token_ids)

    @property
    def version(self) -> str:
        """Of the weights that all servers should have."""
        return f"stepcredit-{self.token}-{self.number}"

    def close(self) -> None:
        self.client.close()
        for one in self.servers:
            self._drop(one)
        if self.server is not None:
            self.server.close()
        if self._remove is not None:
            self._remove()

    # ------------------------------------------------------------------ sampling

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        keep: Callable[[list[int]], int] | None = None,
    ) -> list[list[Segment]]:
        """As `TransformersSampler.sample`; `keep` is left to the servers' prefix caches.

        The column `rollout_logprobs` is there where the servers give log-probabilities of the full distribution: at
        temperature 1 (and 0), or at another without top-p and top-k when they were started for it.
        """
        limits = [params.max_new_tokens] * len(prompts) if limits is None else limits
        stop = self.stop_token_ids if params.stop_token_ids is None else params.stop_token_ids
        full, over = params.temperature in (0, 1) or not params.truncates, threading.Event()
        drawn = 1 if params.temperature == 0 else n
        bodies: list[dict[str, Any]] = [
            {
                "prompt": list(prompt),
                "n": drawn,
                "max_tokens": limit,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k or -1,
                "seed": seed * SPACING % 2**62,
                "stop_token_ids": list(stop),
                "ignore_eos": True,  # the ids above are all that stops
                "logprobs": 0,
                "return_token_ids": True,
                "add_special_tokens": False,
                "skip_special_tokens": False,
                **NEUTRAL,
            }
            for prompt, limit, seed in zip(prompts, limits, seeds, strict=True)
        ]
        if not bodies:
            return []
        self._ensure()
        pool = ThreadPoolExecutor(max(1, self.max_rows // n))
        try:
            requests = [Request(body, frozenset(stop), full, n // drawn, over) for body in bodies]
            futures = [pool.submit(self._complete, request) for request in requests]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return [future.result() for future in futures]
        finally:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _complete(self, request: Request) -> list[Segment]:
        """The completions of one prompt, tried again until the patience is over."""
        pause, last, until = FIRST_PAUSE_S, "", float("inf")
        server: Server | None = None
        while not request.over.is_set():
            server = self._choose(server)
            try:
                if server is None:
                    raise Retry(last or f"no answer of {', '.join(one.url for one in self.servers)}")
                answer = self._post(server, "/v1/completions", request.body | {"model": self._model(server)})
                found = self._read(answer, request, server.url)
                found = [copy.deepcopy(segment) for segment in found for _ in range(request.copies)]
                self.on_progress(len(found))
                return found
            except Retry as error:
                why = str(error)
            finally:
                if server is not None:
                    with self.lock:
                        server.waiting -= 1
            if self.server is not None:
                self.server.check()
            self.on_progress(0)  # the run may be asked to stop
            until = min(until, time.monotonic() + self.patience_s)
            if time.monotonic() >= until:
                raise UserError(f"sampler: no answer for {self.patience_s:g} s (sampler.vllm.patience_s): {why}")
            if why != last:
                log.warning("vLLM: %s; trying again", why)
            last = why
            request.over.wait(min(pause, until - time.monotonic()))
            pause = min(LONGEST_PAUSE_S, 2 * pause)
        return []

    def _choose(self, tried: Server | None) -> Server | None:
        """The server with the least to do, if possible another than `tried`; those that were down are asked again."""
        for server in self.servers:
            if server.down:
                self._revive(server)
        with self.lock:
            up = [server for server in self.servers if not server.down]
            if not up:
                return None
            server = min(up, key=lambda one: (one is tried, one.waiting))
            server.waiting += 1
            return server

    @staticmethod
    def _read(answer: dict[str, Any], request: Request, url: str) -> list[Segment]:
        """The completions of an answer.

        Raises:
            Retry: it was cut short.
        """
        body = request.body
        choices = sorted(answer.get("choices") or (), key=lambda choice: choice["index"])
        if len(choices) != body["n"]:
            raise Retry(f"{url}: {len(choices)} completions instead of {body['n']}")
        found = []
        for choice in choices:
            ids = choice.get("token_ids") or []
            logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
            finish = choice.get("finish_reason")
            whole = bool(ids) and len(ids) == len(logprobs) and None not in logprobs
            ended = finish == "stop" and bool(ids) and ids[-1] in request.stop
            if not whole or not (ended or (finish == "length" and len(ids) == body["max_tokens"])):
                raise Retry(f"{url}: a completion of {len(ids)} tokens that ended by '{finish}' was cut short")
            columns = {"rollout_logprobs": logprobs} if request.full else {}
            found.append(Segment(ids, finish="stop" if ended else "length", columns=columns))
        return found

    # ------------------------------------------------------------------ weights

    def sync(self, policy: Policy) -> None:
        """Give all servers the policy's weights and let them forget what they computed with others.

        Raises:
            UserError: a server does not take them.
        """
        self.state = full_state(policy, keep=self.ranks.main)
        self.number += 1

        def send() -> list[str]:
            why = ""
            for old in self.folder.iterdir():
                shutil.rmtree(old, ignore_errors=True)
            for server in self.servers:
                try:
                    self._load(server)
                except Retry as error:
                    server.down, why = True, str(error)
                    log.warning("vLLM: %s; it gets the weights when it is back", error)
            if self.number == 1 and all(server.down for server in self.servers):
                raise UserError(f"sampler.vllm.servers: {why}")
            return [server.way for server in self.servers]

        for server, way in zip(self.servers, self.ranks.first(send), strict=True):
            server.way = way
        if all(server.way == "folder" for server in self.servers) and (self.folder / self.version).exists():
            self.state = {}  # the folder holds them
        self.metrics = self._cache_metrics()

    def _model(self, server: Server) -> str:
        """The name that a request asks for: adapters are models of their own."""
        return self.version if self.adapted else server.model

    def _load(self, server: Server) -> None:
        """Let a server load the weights of `version`, and check that all its workers have."""
        if not server.way:
            self._find_way(server)
        if self.adapted:  # of a new name, so that nothing that was computed with others is found in the prefix cache
            for old in self._loaded(server) - {self.version}:
                self._post(server, "/v1/unload_lora_adapter", {"lora_name": old})
            if self.version not in self._loaded(server):
                adapters = {"lora_name": self.version, "lora_path": str(self._written())}
                self._post(server, "/v1/load_lora_adapter", adapters)
        else:
            if server.way == "folder":
                self._call(server, "stepcredit_load", str(self._written()), self.version)
            else:
                self._broadcast(server)
            if self._post(server, RESET, {}).get("success") is False:
                raise Retry(f"{server.url} keeps its prefix cache, because others use it")
            if self._call(server, "stepcredit_commit", self.version).get("results") in (None, []):
                raise _not_taken(server)
        if self._loaded(server) != {self.version}:
            raise _not_taken(server)

    def _find_way(self, server: Server) -> None:
        """The first of the possible ways by which weights get to a server; only the first process opens one.

        Raises:
            UserError: there is none.
        """
        if not self.ranks.main:
            raise Retry(f"{server.url} waits for the first process to give it the weights")
        why = ""
        for way in self._ways(server):
            try:
                if way != "folder":
                    server.transfer = Transfer(server.url, way, self.device, partial(self._call, server))
            except TransferError as error:
                why += f"; {error}"
                log.warning("vLLM: weights do not get to %s by %s", server.url, error)
                continue
            server.way = way
            log.info("vLLM: weights go to %s by %s", server.url, way)
            return
        raise UserError(
            f"sampler.vllm.transfer: no way for the weights to {server.url}; name a folder that it sees "
            f"(--sampler.vllm.folder), or let it reach this machine{why}"
        )

    def _ways(self, server: Server) -> list[str]:
        if self.adapted:
            return ["folder"]
        places = self._call(server, "stepcredit_place", str(self.folder)).get("results")
        if not places or not all(isinstance(place, dict) for place in places):
            raise _not_taken(server)
        seen = all(place.get("sees") for place in places)
        if self.way == "folder" or not self.state:
            return ["folder"] * seen
        if self.way != "auto":
            return [self.way]
        seen = seen and all(place.get("heard") for place in places)
        gpus = {place.get("gpu") for place in places}
        apart = gpu_of(self.device) not in gpus | {""} and "" not in gpus
        return ["nccl"] * apart + ["folder"] * seen + ["gloo"]

    def _broadcast(self, server: Server) -> None:
        if not self.ranks.main:
            raise Retry(f"{server.url} waits for the first process to give it the weights")
        assert server.transfer is not None
        try:
            server.transfer.send(checkpoint_tensors(self.policy, self.state), self.version)
        except TransferError as error:
            self._drop(server)
            raise Retry(f"{server.url} has not got the weights ({error})") from error

    def _drop(self, server: Server) -> None:
        """Forget how a server got weights: it may be another now."""
        if server.transfer is not None:
            server.transfer.close()
            server.transfer, server.way = None, ""

    def _written(self) -> Path:
        """The folder with the weights; the first process writes it when it is needed."""
        folder = self.folder / self.version
        with self.writing:
            if self.ranks.main and not folder.exists():
                part = folder.with_suffix(".part")
                save_policy(self.policy, part, self.state)
                part.rename(folder)
        if not folder.exists():
            raise Retry(f"{folder} is not there yet")
        return folder

    def _call(self, server: Server, method: str, *args: str) -> dict[str, Any]:
        """Let all workers of a server run a method of their extension.

        Raises:
            UserError: one of them cannot.
        """
        found = self._post(server, RPC, {"method": method, "args": list(args)})
        results = [result for result in found.get("results") or () if isinstance(result, dict)]
        if errors := list(dict.fromkeys(str(result["error"])[:300] for result in results if "error" in result)):
            raise UserError(f"sampler: a worker of {server.url} has failed ({'; '.join(errors)})")
        return found

    def _loaded(self, server: Server) -> set[str]:
        """The versions that the workers of a server have; of adapters those of this run."""
        if self.adapted:
            own = self.version.rsplit("-", 1)[0]
            return {name for name in self._models(server) if name.startswith(own)}
        return {str(version) for version in self._call(server, "stepcredit_loaded").get("results") or ()}

    def _ensure(self) -> None:
        """All servers have the weights that they should have; one that was restarted gets them."""
        for server in self.servers:
            if server.down:
                continue
            try:
                if self._loaded(server) != {self.version}:
                    log.warning("vLLM: %s was started anew; it gets the weights", server.url)
                    self._drop(server)
                    self._check(server)
                    self._load(server)
            except Retry as error:
                server.down = True
                log.warning("vLLM: %s", error)

    def _revive(self, server: Server) -> None:
        """Ask a server that was down whether it is back, and bring it up to date."""
        if not server.lock.acquire(blocking=False):
            return  # another thread does
        try:
            if not server.down or self.client.get(f"{server.url}/health", timeout=5.0).status_code != 200:
                return
            if self._check(server) != {self.version}:
                self._drop(server)
                self._load(server)
            server.down = False  # not before: other threads would take it with other weights
            log.warning("vLLM: %s is back", server.url)
        except (Retry, httpx.TransportError):
            pass
        finally:
            server.lock.release()

    # ------------------------------------------------------------------ servers

    def _check(self, server: Server) -> set[str]:
        """A server runs a model of the policy's vocabulary, and has our methods; the versions of its weights.

        Raises:
            Retry: it does not answer.
            UserError: it is another.
        """
        server.model = self._models(server)[0]
        ids = list(range(min(PROBE, len(self.policy.tokenizer))))
        last = len(self.policy.tokenizer) - 1
        theirs = self._post(server, "/detokenize", {"model": server.model, "tokens": [*ids, last]}).get("prompt")
        if theirs != self.policy.tokenizer.decode([*ids, last]):
            raise UserError(
                f"sampler.vllm.servers: {server.url} serves '{server.model}', whose vocabulary is not the policy's"
            )
        return self._loaded(server)

    def _models(self, server: Server) -> list[str]:
        """The names of a server's models, the base first.

        Raises:
            Retry: it does not answer.
        """
        try:
            found = self.client.get(f"{server.url}/v1/models", timeout=10.0).json()["data"]
            return [found[0]["id"], *(str(row["id"]) for row in found[1:])]
        except (httpx.TransportError, httpx.InvalidURL, LookupError, TypeError, ValueError) as error:
            raise Retry(
                f"{server.url} does not answer as a vLLM server does ({type(error).__name__}: {error})"
            ) from error

    def _post(self, server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            Retry: it does not answer, or has trouble of its own.
            UserError: it refuses.
        """
        try:
            answer = self.client.post(f"{server.url}{path}", json=body)
        except httpx.TransportError as error:
            server.down = True
            raise Retry(f"{server.url} does not answer ({type(error).__name__})") from error
        if answer.status_code == 404 and path in DEVELOPMENT:
            raise UserError(
                f"sampler.vllm.servers: {server.url} has no {path}; start it with VLLM_SERVER_DEV_MODE=1 (docs/vllm.md)"
            )
        if answer.status_code >= 500 and path != RPC:
            raise Retry(f"{server.url}{path} failed ({answer.status_code})")
        if answer.status_code >= 400:
            hint = next((text for paths, text in HINTS.items() if path in paths), "")
            if path == RPC and body["method"] != "stepcredit_loaded" and "no attribute" not in answer.text:
                hint = ""  # the method is there, and has failed
            raise UserError(f"sampler.vllm.servers: {server.url}{path} refuses ({answer.text[:300]}){hint}")
        if path in ADAPTERS:  # which answer in words
            return {}
        try:
            return dict(answer.json()) if answer.content else {}
        except (TypeError, ValueError) as error:
            raise Retry(f"{server.url}{path}: an answer that was cut short") from error

    def _cache_metrics(self) -> dict[str, float]:
        """Share of prompt tokens that the prefix caches had, since the last call."""
        queries = hits = 0.0
        for server in self.servers:
            try:
                text = self.client.get(f"{server.url}/metrics", timeout=10.0).text
            except httpx.TransportError:
                continue
            now = (_counter(text, "vllm:prefix_cache_queries_total"), _counter(text, "vllm:prefix_cache_hits_total"))
            before = self._counted.get(server.url, (0.0, 0.0))
            self._counted[server.url] = now
            if now[0] >= before[0]:  # else it was started anew
                queries, hits = queries + now[0] - before[0], hits + now[1] - before[1]
        return {"sampler/prefix_hits": hits / queries} if queries else {}


def _new_folder(parent: Path | None) -> Path:
    """An empty folder of the run's own; below a parent that was named, other users' servers may read it.

    Its file `lock` is locked as long as this process lives, so that folders of runs that were killed are known and go.
    """
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    where = (parent or (MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir()))).absolute()
    for old in where.glob("stepcredit-*/lock"):
        with suppress(OSError), old.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old.parent, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix="stepcredit-", dir=where))
    lock = (made / "unlocked").open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (made / "unlocked").rename(made / "lock")
    LOCKS.append(lock)
    if parent is not None:
        made.chmod(0o755)
    return made


def _not_taken(server: Server) -> UserError:
    return UserError(f"sampler: {server.url} has not taken over the weights; restart it as docs/vllm.md says")


def gpu_of(device: torch.device) -> str:
    """What tells a GPU from all others; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _counter(text: str, name: str) -> float:
    """The sum of a Prometheus counter over its labels."""
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith((name + "{", name + " ")))
    return sum(float(value) for _, value in rows)
