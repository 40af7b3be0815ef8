"""The sampler of runs whose completions come from the data: it has none."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.forest.types import Segment
from stepcredit.learn.placement import Placement
from stepcredit.samplers.base import sampler
from stepcredit.samplers.params import SamplingParams

if TYPE_CHECKING:
    from stepcredit.policy.forward import Policy


class NoSampler:
    """Args: stop: token ids that end a completion of the model."""

    max_rows = 1

    def __init__(self, stop: Sequence[int]) -> None:
        self.stop_token_ids = tuple(stop)
        self.on_progress: Callable[[int], None] = lambda _: None
        self.metrics: dict[str, float] = {}

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        num_reusable: Callable[[list[int]], int] | None = None,
    ) -> list[list[Segment]]:
        raise UserError("sampler.name: this run takes the completions of its data, and something asks for samples")

    def sync(self, policy: "Policy") -> None:
        """Nothing holds weights."""

    def close(self) -> None:
        """Nothing is open."""


@sampler(columns=(), elsewhere=False, copies_when_sharded=False)
def build(config: Config, policy: "Policy", placement: Placement) -> NoSampler:
    return NoSampler(policy.stop_token_ids)
