"""The servers of a run: which of them takes a request, what is tried again, who is down and comes back."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import httpx

from stepcredit.errors import UserError
from stepcredit.policy.forward import Policy
from stepcredit.samplers.remote.connection import MEMORY, QUICK_S, Retry, Server
from stepcredit.samplers.remote.dialect import Completion, Dialect, Request
from stepcredit.samplers.remote.launch import LocalServer
from stepcredit.samplers.remote.weights import Weights

log = logging.getLogger("stepcredit")

PROBE = 64  # ids whose text is compared with the server's
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
CONNECTING_S = 10.0
IDLE_S = 2.0  # connections are kept; servers close theirs after 5 s


class Pool:
    """Servers that are chosen by how little they have to do.

    Args:
        policy: whose vocabulary they must have.
        weights: what they must have before they are asked for anything.
        timeout_s: of a request.
        patience_s: how long a request that failed is tried again before the run ends.
        local: a server of the run's own among them.
    """

    def __init__(
        self,
        dialect: Dialect,
        policy: Policy,
        weights: Weights,
        urls: Sequence[str],
        timeout_s: float,
        patience_s: float,
        local: LocalServer | None,
    ) -> None:
        self.dialect, self.policy, self.weights, self.local = dialect, policy, weights, local
        self.patience_s = patience_s
        limits = httpx.Limits(max_connections=None, keepalive_expiry=IDLE_S)
        timeout = httpx.Timeout(timeout_s, connect=CONNECTING_S)
        self.client = httpx.Client(timeout=timeout, limits=limits, trust_env=False)  # no proxy stands between
        self.servers = [Server(url, self.client, dialect) for url in urls]
        self.choosing = threading.Lock()
        self._counted: dict[str, tuple[float, float]] = {}

    def close(self) -> None:
        self.client.close()
        for server in self.servers:
            self.weights.forget_way(server)
        if self.local is not None:
            self.local.close()

    # ------------------------------------------------------------------ requests

    def complete(self, request: Request, over: threading.Event, on_progress: Callable[[int], None]) -> list[Completion]:
        """The completions of one prompt, tried again until the patience is over.

        Args:
            over: set when nobody waits for the answer any more; then there are none.
            on_progress: called before another try, with 0: the run may be asked to stop.

        Raises:
            UserError: a server refuses, or there is no answer.
        """
        pause, last, until = FIRST_PAUSE_S, "", float("inf")
        server: Server | None = None
        while not over.is_set():
            server = self._choose(server)
            try:
                if server is None:
                    raise Retry(last or f"no answer of {', '.join(one.url for one in self.servers)}")
                body = self.dialect.body(request, self.weights.model(server))
                answer = server.post(self.dialect.completions_path, body)
                return whole_completions(self.dialect.read(answer), request, server.url)
            except Retry as error:
                why = str(error)
            finally:
                if server is not None:
                    with self.choosing:
                        server.waiting -= 1
            if self.local is not None:
                self.local.check()
            on_progress(0)
            until = min(until, time.monotonic() + self.patience_s)
            if time.monotonic() >= until:
                raise UserError(f"sampler: no answer for {self.patience_s:g} s (sampler.server.patience_s): {why}")
            if why != last:
                log.warning("%s: %s; trying again", self.dialect.name, why)
            last = why
            over.wait(min(pause, until - time.monotonic()))
            pause = min(LONGEST_PAUSE_S, 2 * pause)
        return []

    def _choose(self, tried: Server | None) -> Server | None:
        """The server with the least to do, if possible another than `tried`; those that were down are asked again."""
        for server in self.servers:
            if server.down:
                self._revive(server)
        with self.choosing:
            up = [server for server in self.servers if not server.down]
            if not up:
                return None
            server = min(up, key=lambda one: (one is tried, one.waiting))
            server.waiting += 1
            return server

    # ------------------------------------------------------------------ servers that sleep, end and come back

    def sleep(self, level: int) -> None:
        """Let all servers sleep.

        Raises:
            UserError: one cannot.
        """
        for server in self.servers:
            if not server.down:
                try:
                    self.dialect.sleep(server, level)
                except Retry as error:
                    server.down = True
                    log.warning("%s: %s", self.dialect.name, error)

    def check(self, server: Server) -> set[str]:
        """A server runs a model of the policy's vocabulary, and has our methods; the versions of its weights.

        Raises:
            Retry: it does not answer.
            UserError: it is another.
        """
        server.model = server.models()[0]
        tokenizer = self.policy.tokenizer
        ids = [*range(min(PROBE, len(tokenizer))), len(tokenizer) - 1]
        if self.dialect.text(server, ids) != tokenizer.decode(ids):
            raise UserError(
                f"sampler.server.urls: {server.url} serves '{server.model}', whose vocabulary is not the policy's"
            )
        self._look(server)
        return self.weights.loaded(server)

    def _look(self, server: Server) -> None:
        """Ask a server whether it sleeps: another run may have left it so, or another process woken it."""
        server.asleep = (server.asleep or set(MEMORY)) if self.dialect.is_asleep(server) else set()

    def ensure(self) -> None:
        """All servers are awake and have the weights that they should have; one that was restarted gets them."""
        for server in self.servers:
            if server.down:
                continue
            try:
                if self.weights.loaded(server) != {self.weights.version}:
                    log.warning("%s: %s was started anew; it gets the weights", self.dialect.name, server.url)
                    self.weights.forget_way(server)
                    self.check(server)
                    self.weights.load(server)
                elif server.asleep:
                    self._look(server)
                    self.weights.load(server)
            except Retry as error:
                server.down = True
                log.warning("%s: %s", self.dialect.name, error)

    def _revive(self, server: Server) -> None:
        """Ask a server that was down whether it is back, and bring it up to date."""
        if not server.lock.acquire(blocking=False):
            return  # another thread does
        try:
            if not server.down or not server.is_healthy():
                return
            if self.check(server) != {self.weights.version} or server.asleep:
                self.weights.forget_way(server)
                self.weights.load(server)
            server.down = False  # not before: other threads would take it with other weights
            log.warning("%s: %s is back", self.dialect.name, server.url)
        except (Retry, httpx.TransportError) as error:
            log.debug("%s: %s is still down (%s)", self.dialect.name, server.url, error)
        finally:
            server.lock.release()

    # ------------------------------------------------------------------ metrics

    def cache_metrics(self) -> dict[str, float]:
        """Share of prompt tokens that the prefix caches had, since the last call."""
        all_queries = all_hits = 0.0
        for server in self.servers:
            try:
                text = server.get(self.dialect.metrics_path, QUICK_S).text
            except httpx.TransportError:
                continue
            queries, hits = (counter(text, name) for name in self.dialect.cache_counters)
            queries_before, hits_before = self._counted.get(server.url, (0.0, 0.0))
            self._counted[server.url] = (queries, hits)
            if queries >= queries_before:  # else it was started anew
                all_queries += queries - queries_before
                all_hits += hits - hits_before
        return {"sampler/prefix_hits": all_hits / all_queries} if all_queries else {}


def whole_completions(found: list[Completion], request: Request, url: str) -> list[Completion]:
    """The completions of an answer, if all that were asked for are there and none was cut short.

    Raises:
        Retry: that is not so.
    """
    if len(found) != request.number:
        raise Retry(f"{url}: {len(found)} completions instead of {request.number}")
    for one in found:
        ids, count = one.token_ids, len(one.token_ids)
        complete = count > 0 and count == len(one.logprobs) and None not in one.logprobs
        ended = one.finish == "stop" and count > 0 and ids[-1] in request.stop
        reached_limit = one.finish == "length" and count == request.limit
        if not complete or not (ended or reached_limit):
            raise Retry(f"{url}: a completion of {count} tokens that ended by '{one.finish}' was cut short")
    return found


def counter(text: str, name: str) -> float:
    """The sum of a Prometheus counter over its labels."""
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith((name + "{", name + " ")))
    return sum(float(value) for _, value in rows)
