"""What differs from one engine of servers to another.

A new engine is a subclass of `Dialect` with a builder (`remote_sampler` in sampler.py) in a file of its own, and a row
in `samplers/table.py`.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepcredit.errors import UserError
from stepcredit.samplers.params import SamplingParams

if TYPE_CHECKING:
    from stepcredit.samplers.remote.connection import Server


@dataclass(frozen=True)
class Start:
    """A server that is to be started on this machine.

    Attributes:
        model: folder or hub id.
        dtype: of the computation, as `train.dtype` has it.
        params: how training will sample; they decide what kind of log-probabilities the server is to give.
        python: the interpreter of the environment that has the engine.
        port: 0 takes a free one.
        lora_rank: of the adapters that it will be given; 0: none.
        sleeps: it will be asked to give back its memory and take it again.
        memory: share of its GPU that it takes; None: what the engine takes by itself.
        gpus: those that it sees, as CUDA_VISIBLE_DEVICES names them; None: all that this process sees.
        args: further arguments of the server.
    """

    model: str
    dtype: str
    params: SamplingParams
    python: str = sys.executable
    port: int = 0
    lora_rank: int = 0
    sleeps: bool = False
    memory: float | None = None
    gpus: Sequence[str] | None = None
    args: Sequence[str] = ()


@dataclass(frozen=True)
class Request:
    """The completions of one prompt.

    Attributes:
        number: of completions that are asked for.
        copies: of each of these that the caller gets.
        limit: most tokens of a completion.
        stop: ids that end a completion; nothing else does.
    """

    prompt: list[int]
    number: int
    copies: int
    limit: int
    seed: int
    stop: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Completion:
    """What an answer says of one completion; it may have been cut short.

    Attributes:
        logprobs: one for each token.
        finish: "stop", "length", or whatever else the server says.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    finish: str | None


@dataclass(frozen=True)
class Place:
    """Where a worker of a server is.

    Attributes:
        gpu: what tells its GPU from all others; empty without one.
        sees_folder: it can read the run's folder.
        is_heard: the trainer would be told if it failed to load weights from there.
        dtype: in which it holds weights, such as "bfloat16"; empty: it does not say.
    """

    gpu: str
    sees_folder: bool
    is_heard: bool
    dtype: str = ""


class Dialect(ABC):
    """How to talk to the servers of an engine. It keeps no state: what is known of a server is in `Server`.

    Methods that take a server make requests to it, and raise `Retry` where it has trouble of its own and `UserError`
    where it refuses.

    Attributes:
        name: of the engine, in messages.
        manual: the page that says how to start a server.
        health_path: answers with status 200 once the server is ready.
        completions_path: takes `body`.
        metrics_path: Prometheus counters.
        cache_counters: names of those of prompt tokens that were looked up in the prefix cache, and were found.
    """

    name: str
    manual: str
    health_path: str
    completions_path: str
    metrics_path: str
    cache_counters: tuple[str, str]

    # ------------------------------------------------------------------ a server of the run's own

    @abstractmethod
    def command(self, start: Start) -> list[str]:
        """What starts a server at 127.0.0.1; the port is never 0."""

    @abstractmethod
    def environment(self, own: Mapping[str, str]) -> dict[str, str]:
        """The environment variables of a server, from those of this process.

        `LocalServer` puts the folder `server/` before its PYTHONPATH.
        """

    # ------------------------------------------------------------------ requests and answers

    @abstractmethod
    def gives_full_logprobs(self, params: SamplingParams) -> bool:
        """Whether log-probabilities are those of the full distribution at the sampling temperature."""

    @abstractmethod
    def number_asked(self, params: SamplingParams, n: int) -> int:
        """How many of `n` completions a request asks for; the others are copies."""

    @abstractmethod
    def body(self, request: Request, model: str) -> dict[str, Any]:
        """What a request says; `model` is the name under which the server has the weights."""

    @abstractmethod
    def read(self, answer: Mapping[str, Any]) -> list[Completion]:
        """The completions of an answer, in the order of their seeds."""

    # ------------------------------------------------------------------ what a server says of itself

    @abstractmethod
    def models(self, server: "Server") -> list[str]:
        """The names of its models, the base first. It may raise whatever reading an unexpected answer raises."""

    @abstractmethod
    def text(self, server: "Server", token_ids: list[int]) -> str | None:
        """The text of tokens by its vocabulary."""

    def is_temporary(self, path: str, status: int) -> bool:
        """Whether a status of 400 or more may be another when the request is made again."""
        return status >= 500

    def refusal(self, path: str, body: Mapping[str, Any], status: int, text: str) -> str:
        """What a status that stays says, behind the server's address, and what to do."""
        return f"{path} refuses ({text[:300]})"

    # ------------------------------------------------------------------ weights

    @abstractmethod
    def call_workers(self, server: "Server", method: str, *args: str) -> list[Any]:
        """Let all workers run a method of `server/stepcredit_worker.py`, or what is the same there; their answers.

        Raises:
            UserError: one of them cannot.
        """

    @abstractmethod
    def versions(self, server: "Server") -> set[str]:
        """The versions of the weights that its workers have; empty text for the server's own."""

    @abstractmethod
    def places(self, server: "Server", folder: Path) -> list[Place]:
        """Where its workers are; none where they do not say."""

    @abstractmethod
    def load_folder(self, server: "Server", folder: Path, version: str) -> None:
        """Let it load the weights in a folder."""

    @abstractmethod
    def forget(self, server: "Server") -> bool:
        """Let it empty its prefix cache; whether it has."""

    @abstractmethod
    def commit(self, server: "Server", version: str) -> bool:
        """Let it say from now on that it has this version; whether it will."""

    # ------------------------------------------------------------------ memory

    def is_asleep(self, server: "Server") -> bool:
        """Whether it has given back its memory, and answers no requests for completions."""
        return False

    def sleep(self, server: "Server", level: int) -> None:
        """Let it give back the memory of its GPU.

        Args:
            level: 1: it keeps its weights in the memory of the CPU; 2: it forgets them.
        """
        raise UserError(f"sampler.server.sleep: a {self.name} server cannot; take --sampler.server.sleep off")

    def wake(self, server: "Server", what: str) -> None:
        """Let a server that sleeps take memory again for its "weights", or for its "kv_cache"."""
        raise UserError(f"sampler.server.sleep: a {self.name} server cannot; take --sampler.server.sleep off")

    # ------------------------------------------------------------------ adapters

    @abstractmethod
    def load_adapter(self, server: "Server", name: str, folder: Path) -> None:
        """Let it take the adapters in a folder for a model of this name."""

    @abstractmethod
    def unload_adapter(self, server: "Server", name: str) -> None:
        """Let it forget such a model."""
