"""The Sampler interface: token ids in, completions out; and what a run knows of a sampler before it builds one.

A builder is `build(config, policy, placement, **options) -> Sampler`. `@sampler` declares what its sampler provides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from stepcredit.forest.types import Segment
from stepcredit.samplers.options import SamplerOptions
from stepcredit.samplers.params import SamplingParams, Stream

if TYPE_CHECKING:
    from stepcredit.policy.forward import Policy

OTHER_MODEL = "The sampler has other weights than those that are trained, or another type of numbers"


class Sampler(Protocol):
    """Draws completions; `TransformersSampler` says what each argument means."""

    on_progress: Callable[[int], None]
    max_rows: int
    metrics: dict[str, float]  # of the sampler itself, since the last `sync`

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        num_reusable: Callable[[list[int]], int] | None = None,
    ) -> list[list[Segment]]: ...

    def sync(self, policy: "Policy") -> None: ...

    def close(self) -> None: ...


class SamplerInWindows(Sampler, Protocol):
    """One that goes on with completions (trait `goes_on`)."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        num_reusable: Callable[[list[int]], int] | None = None,
        streams: Sequence[Stream] | None = None,
    ) -> list[list[Segment]]: ...


Builder = Callable[..., Sampler]


def rest(sampler: Sampler) -> None:
    """Let a sampler that can sleep (it has a method `sleep`) give back memory until it is synced or samples again."""
    sleep = getattr(sampler, "sleep", None)
    if sleep is not None:
        sleep()


def always_there(options: SamplerOptions) -> str:
    """`why_no_logprobs` of samplers whose segments have them whatever the options are: no reason."""
    return ""


@dataclass(frozen=True)
class Traits:
    """What a sampler provides; the defaults are those of a builder that declares nothing.

    Attributes:
        columns: token columns that its segments have.
        elsewhere: it computes in another program, so that its log-probabilities differ from the trainer's by rounding:
            the trainer computes its own, and compares them with the column `rollout_logprobs`.
        copies_when_sharded: it holds an unsharded copy of the policy on each GPU when the policy is sharded.
        why_no_logprobs: from the options, why segments come without `rollout_logprobs`, and what to do; else empty.
        other_model: what to look for when its log-probabilities are not the trainer's.
        goes_on: `sample` takes `streams`, so that it can go on with completions (sampler.window).
    """

    columns: tuple[str, ...] = ("rollout_logprobs",)
    elsewhere: bool = True
    copies_when_sharded: bool = False
    why_no_logprobs: Callable[[SamplerOptions], str] = always_there
    other_model: str = OTHER_MODEL
    goes_on: bool = False


def sampler(
    columns: tuple[str, ...],
    elsewhere: bool,
    copies_when_sharded: bool,
    why_no_logprobs: Callable[[SamplerOptions], str] = always_there,
    other_model: str = OTHER_MODEL,
    goes_on: bool = False,
) -> Callable[[Builder], Builder]:
    """Declare the `Traits` of the sampler that a builder makes."""
    traits = Traits(columns, elsewhere, copies_when_sharded, why_no_logprobs, other_model, goes_on)

    def declare(builder: Builder) -> Builder:
        builder.traits = traits  # type: ignore[attr-defined]
        return builder

    return declare


def traits_of(builder: Builder) -> Traits:
    """What a builder declared."""
    traits = getattr(builder, "traits", None)
    return traits if isinstance(traits, Traits) else Traits()
