"""Keys and values held for later calls, found by the tokens that they are of."""

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

from stepcredit.policy.decoding import Prefix


class Kept:
    """Prefixes by their whole path of token ids, up to a budget of memory.

    What is asked for may end inside of what was kept: it is split there, so that both parts are held once.

    Args:
        max_bytes: of keys and values; what does not fit is not kept.
    """

    def __init__(self, max_bytes: float = float("inf")) -> None:
        self.max_bytes = max_bytes
        self.clear()

    def clear(self) -> None:
        self.bytes = 0
        self._paths: list[bytes] = []  # sorted: those that begin with one stand behind it
        self._prefixes: dict[bytes, Prefix] = {}

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return _key(tokens) in self._prefixes

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._prefixes.values())

    def get(self, tokens: Sequence[int]) -> Prefix | None:
        """The prefix of just these tokens, if there is one."""
        return self._prefixes.get(_key(tokens))

    def add(self, tokens: Sequence[int], prefix: Prefix) -> None:
        """Hold a prefix, `tokens` with everything before it, if there is room."""
        key = _key(tokens)
        if key not in self._prefixes:
            if self.bytes + prefix.num_bytes > self.max_bytes:
                return
            self.bytes += prefix.num_bytes
            insort(self._paths, key)
        self._prefixes[key] = prefix

    def cut(self, tokens: Sequence[int]) -> Prefix | None:
        """The prefix of these tokens, split off what was kept where that goes on; None where nothing has them."""
        key = _key(tokens)
        place = bisect_left(self._paths, key)
        if not tokens or place == len(self._paths) or not self._paths[place].startswith(key):
            return None
        prefix = self._prefixes[self._paths[place]]
        while prefix.above is not None and prefix.start >= len(tokens):
            prefix = prefix.above
        if prefix.end > len(tokens):
            prefix = prefix.split(len(tokens) - prefix.start)
        if key not in self._prefixes:
            self._prefixes[key] = prefix
            insort(self._paths, key)
        return prefix


def _key(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()
