"""Sampling by servers: token ids in and out by HTTP, weights through a folder that they load or by broadcast.

A request is a prompt with all its completions. Servers are taken by how little they have to do; one that does not
answer is left alone and tried again, and gets the weights anew before it is used. Prompts that continue others are
computed from where they part, by the servers' prefix caches.
"""

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.forest.types import Segment
from stepcredit.learn.placement import Placement
from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import source_of
from stepcredit.processes.ranks import SINGLE_PROCESS, Ranks
from stepcredit.samplers.gpus import server_gpus
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.remote.connection import MEMORY, Retry
from stepcredit.samplers.remote.dialect import Completion, Dialect, Request, Start
from stepcredit.samplers.remote.launch import LocalServer
from stepcredit.samplers.remote.options import ServerOptions
from stepcredit.samplers.remote.pool import Pool
from stepcredit.samplers.remote.weights import Weights


class RemoteSampler:
    """Samples with servers whose weights follow the policy's.

    Args:
        dialect: of the servers.
        policy: whose vocabulary and stop ids hold, and whose weights are sent.
        urls: of the servers, such as http://127.0.0.1:8000.
        options: how requests are made and weights are sent; not which servers there are.
        max_rows: completions in flight at once, over all servers.
        ranks: the processes of the run; the first sends the weights.
        local: a server of the run's own, to be ended with it.
        device: on which the policy will compute; None: where it is.

    Attributes:
        metrics: of the time since the last `sync`.

    Raises:
        UserError: a server does not answer, is another than it should be, or does not take the weights.
    """

    def __init__(
        self,
        dialect: Dialect,
        policy: Policy,
        urls: Sequence[str],
        options: ServerOptions | None = None,
        max_rows: int = 256,
        ranks: Ranks = SINGLE_PROCESS,
        local: LocalServer | None = None,
        device: torch.device | None = None,
    ) -> None:
        options = options or ServerOptions()
        self.dialect, self.policy, self.max_rows = dialect, policy, max_rows
        self.on_progress: Callable[[int], None] = lambda _: None
        self.metrics: dict[str, float] = {}
        self.sleep_level = 0 if options.sleep in ("auto", "off") else int(options.sleep)
        self.weights = Weights(dialect, policy, ranks, options.transfer, device or policy.device)
        self.pool = Pool(dialect, policy, self.weights, urls, options.timeout_s, options.patience_s, local)
        for server in self.pool.servers:
            try:
                self.pool.check(server)
            except Retry as error:
                raise UserError(f"sampler.server.urls: {error}") from error
        self.weights.open_folder(Path(options.folder) if options.folder else None)
        try:
            self.sync(policy)  # now, because all processes take part, and some may have nothing to sample
        except BaseException:
            self.close()
            raise

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The model's own."""
        return tuple(self.policy.stop_token_ids)

    def close(self) -> None:
        self.pool.close()
        self.weights.close()

    def sleep(self) -> None:
        """Let the servers give back their memory until `sync` or `sample`; all processes call this.

        Raises:
            UserError: a server cannot.
        """
        if not self.sleep_level:
            return
        self.weights.ranks.barrier()  # some may be sampling still
        self.weights.ranks.on_main(lambda: self.pool.sleep(self.sleep_level))
        for server in self.pool.servers:
            server.asleep = set(MEMORY)

    def sync(self, policy: Policy) -> None:
        """Give all servers the policy's weights and let them forget what they computed with others; they are awake.

        Raises:
            UserError: a server does not take them.
        """
        self._make_room()
        self.weights.update(policy, self.pool.servers)
        self.metrics = self.pool.cache_metrics()

    def _make_room(self) -> None:
        """What an update has left of the GPU's memory is room for servers that wake."""
        if any(server.asleep for server in self.pool.servers):
            torch.cuda.empty_cache()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        num_reusable: Callable[[list[int]], int] | None = None,
    ) -> list[list[Segment]]:
        """As `TransformersSampler.sample`; `num_reusable` is left to the servers' prefix caches.

        The column `rollout_logprobs` is there where the servers give log-probabilities of the full distribution
        (`Dialect.gives_full_logprobs`).
        """
        if not prompts:
            return []
        limits = [params.max_new_tokens] * len(prompts) if limits is None else limits
        stop = self.stop_token_ids if params.stop_token_ids is None else tuple(params.stop_token_ids)
        number = self.dialect.number_asked(params, n)
        requests = [
            Request(list(prompt), number, n // number, limit, seed, stop, params)
            for prompt, limit, seed in zip(prompts, limits, seeds, strict=True)
        ]
        self._make_room()
        self.pool.ensure()
        over = threading.Event()
        threads = ThreadPoolExecutor(max(1, self.max_rows // n))
        try:
            futures = [threads.submit(self._group, request, over) for request in requests]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return [future.result() for future in futures]
        finally:
            over.set()
            threads.shutdown(wait=False, cancel_futures=True)

    def _group(self, request: Request, over: threading.Event) -> list[Segment]:
        """The completions of one prompt."""
        found = self.pool.complete(request, over, self.on_progress)
        full = self.dialect.gives_full_logprobs(request.params)
        group = [segment_of(one, full) for one in found for _ in range(request.copies)]
        if group:
            self.on_progress(len(group))
        return group


def segment_of(completion: Completion, with_logprobs: bool) -> Segment:
    """A segment of a whole completion, with lists of its own."""
    logprobs = [value for value in completion.logprobs if value is not None]
    return Segment(
        list(completion.token_ids),
        finish="stop" if completion.finish == "stop" else "length",
        columns={"rollout_logprobs": logprobs} if with_logprobs else {},
    )


def remote_sampler(dialect: Dialect, config: Config, policy: Policy, placement: Placement) -> RemoteSampler:
    """The sampler of a config, with servers that run or with one that is started here.

    Whether a server of the run's own sleeps, and its share of a GPU, `fit_server` (run/servers.py) has decided.

    Raises:
        UserError: neither is named, or both are; the server does not start.
    """
    given, options = config.sampler, config.sampler.server
    if bool(options.urls) == options.launch:
        raise UserError(
            f"sampler.name {given.name} needs running servers (--sampler.server.urls http://HOST:PORT,...) or one of "
            "its own (--sampler.server.launch true), not both"
        )
    urls, started = list(options.urls), list[LocalServer]()

    def start() -> str:
        wanted = Start(
            model=source_of(config.model),
            dtype=str(policy.autocast or torch.float32).removeprefix("torch."),
            python=options.python or sys.executable,
            port=options.port,
            params=given,
            lora_rank=config.lora.rank,
            sleeps=options.sleep in ("1", "2"),
            memory=options.memory,
            gpus=server_gpus(policy.device, placement.ranks),
            args=tuple(options.args),
        )
        log_file = Path(tempfile.gettempdir()) / f"stepcredit-{dialect.name.lower()}-{os.getpid()}.log"
        started.append(LocalServer(dialect, wanted, log_file))
        return started[0].url

    if options.launch:
        torch.cuda.empty_cache()  # what loading has left is room for the server
        urls = [placement.ranks.on_main(start)]
    return RemoteSampler(
        dialect,
        policy,
        urls,
        options,
        given.max_rows,
        placement.ranks,
        started[0] if started else None,
        placement.device if placement.sharded else None,
    )
