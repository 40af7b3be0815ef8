"""One server: the requests to it, what their failures mean, and what the run knows of it."""

import threading
from typing import Any

import httpx

from stepcredit.errors import UserError
from stepcredit.samplers.remote.dialect import Dialect
from stepcredit.samplers.remote.transfer import Transfer

MEMORY = ("weights", "kv_cache")  # what a server has memory for
QUICK_S = 10.0  # seconds for what takes no computing
HEALTH_S = 5.0


class Retry(Exception):
    """A request that may succeed when it is made again, here or elsewhere."""


class Server:
    """
    Attributes:
        model: the name of its base model.
        waiting: requests that it has.
        down: it has not answered; it is asked again later.
        lock: of the one that asks.
        way: how it gets weights: "folder", or a backend of `Transfer`; empty: not yet decided.
        transfer: of a way that needs one.
        dtype: in which it holds weights, such as "bfloat16"; empty: it does not say; None: not yet asked.
        asleep: what it has no memory for, of `MEMORY`; one that is woken halfway may go down.
    """

    def __init__(self, url: str, client: httpx.Client, dialect: Dialect) -> None:
        self.url, self.client, self.dialect = url.rstrip("/"), client, dialect
        self.model, self.way = "", ""
        self.waiting, self.down = 0, False
        self.lock = threading.Lock()
        self.transfer: Transfer | None = None
        self.dtype: str | None = None
        self.asleep: set[str] = set()

    def get(self, path: str, timeout_s: float = QUICK_S) -> httpx.Response:
        """
        Raises:
            httpx.TransportError: it does not answer.
        """
        return self.client.get(f"{self.url}{path}", timeout=timeout_s)

    def is_healthy(self) -> bool:
        """
        Raises:
            httpx.TransportError: it does not answer.
        """
        return self.get(self.dialect.health_path, HEALTH_S).status_code == 200

    def models(self) -> list[str]:
        """The names of its models, the base first.

        Raises:
            Retry: it does not answer.
        """
        try:
            return self.dialect.models(self)
        except (httpx.TransportError, httpx.InvalidURL, LookupError, TypeError, ValueError) as error:
            raise Retry(
                f"{self.url} does not answer as a {self.dialect.name} server does ({type(error).__name__}: {error})"
            ) from error

    def tell(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """Make a request whose answer may be anything.

        Raises:
            Retry: it does not answer, or has trouble of its own.
            UserError: it refuses.
        """
        try:
            answer = self.client.post(f"{self.url}{path}", json=body)
        except httpx.TransportError as error:
            self.down = True
            raise Retry(f"{self.url} does not answer ({type(error).__name__})") from error
        status = answer.status_code
        if status < 400:
            return answer
        if self.dialect.is_temporary(path, status):
            raise Retry(f"{self.url}{path} failed ({status})")
        raise UserError(f"sampler.server.urls: {self.url}{self.dialect.refusal(path, body, status, answer.text)}")

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Make a request whose answer is a JSON object, or empty.

        Raises:
            Retry, UserError: as for `tell`.
        """
        answer = self.tell(path, body)
        try:
            return dict(answer.json()) if answer.content else {}
        except (TypeError, ValueError) as error:
            raise Retry(f"{self.url}{path}: an answer that was cut short") from error

    def not_taken(self) -> UserError:
        """The error of a server that does not do what it was told."""
        return UserError(
            f"sampler: {self.url} has not taken over the weights; restart it as {self.dialect.manual} says"
        )
