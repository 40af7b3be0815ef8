"""The Sampler seam: token ids in, completions out."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from stepcredit.forest.types import Segment
from stepcredit.samplers.params import SamplingParams

if TYPE_CHECKING:
    from stepcredit.policy.forward import Policy


class Sampler(Protocol):
    """Draws completions; `TransformersSampler` says what each argument means."""

    on_progress: Callable[[int], None]
    max_rows: int
    metrics: dict[str, float]  # of its own, since the last `sync`

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        keep: Callable[[list[int]], int] | None = None,
    ) -> list[list[Segment]]: ...

    def sync(self, policy: "Policy") -> None: ...

    def close(self) -> None: ...
