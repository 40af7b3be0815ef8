"""A cache of keys and values for later calls, looked up by token ids."""

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

from stepcredit.policy.decoding import Prefix as OwnPrefix
from stepcredit.policy.paged import PagedPrefix

Prefix = OwnPrefix | PagedPrefix


class PrefixCache:
    """Prefixes by all their token ids from the start of the prompt, up to a budget of memory.

    A look-up may end inside a cached prefix, which is then cut there, so that both parts are stored once.

    Args:
        max_bytes: of keys and values; a prefix that does not fit is not stored.
    """

    def __init__(self, max_bytes: float = float("inf")) -> None:
        self.max_bytes = max_bytes
        self.clear()

    def clear(self) -> None:
        self.bytes = 0
        self._paths: list[bytes] = []  # sorted: a path comes before those that begin with it
        self._prefixes: dict[bytes, Prefix] = {}

    def __len__(self) -> int:
        return len(self._prefixes)

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return _key(tokens) in self._prefixes

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._prefixes.values())

    def get(self, tokens: Sequence[int]) -> Prefix | None:
        """The prefix of exactly these tokens; None: there is none."""
        return self._prefixes.get(_key(tokens))

    def add(self, tokens: Sequence[int], prefix: Prefix) -> None:
        """Store a prefix if there is room; `tokens` are all from the start of the prompt to its end."""
        key = _key(tokens)
        if key not in self._prefixes:
            if self.bytes + prefix.num_bytes > self.max_bytes:
                return
            self.bytes += prefix.num_bytes
            insort(self._paths, key)
        self._prefixes[key] = prefix

    def find(self, tokens: Sequence[int]) -> Prefix | None:
        """The prefix of these tokens, cut off a longer one if need be; None: no cached prefix begins with them."""
        key = _key(tokens)
        place = bisect_left(self._paths, key)
        if not tokens or place == len(self._paths) or not self._paths[place].startswith(key):
            return None
        prefix = self._prefixes[self._paths[place]]
        if key not in self._prefixes:
            prefix, more = prefix.cut(len(tokens))
            self._prefixes[key] = prefix
            self.bytes += more
            insort(self._paths, key)
        return self._prefixes[key]


def _key(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()
