"""The Estimator seam: what adds columns to a forest before the credit, and what its builder declares."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.growth.rollouts import Rollouts
from stepcredit.learn.learner import Learner
from stepcredit.learn.loading import load_model
from stepcredit.learn.placement import UNSHARDED, Placement
from stepcredit.policy.forward import Policy
from stepcredit.policy.limits import check_positions, check_shared_vocabulary


class Estimator:
    """Adds columns (of tokens, segments or trees) to a forest and, where it learns, updates itself while doing so.

    Attributes:
        metrics: of the last forest.
        trained: what is saved with every checkpoint, as a folder that `from_pretrained` loads; None: nothing.
        holds_policy: the policy does not learn from the last forest, because this estimator is not ready for it.
    """

    holds_policy = False

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.trained: Learner | None = None

    def prepare(self, folder: Path, show: Callable[[int, int], None], check: Callable[[], None]) -> None:
        """What is to be done before training, while policy and sampler have the weights that training starts from.

        A run that goes on calls it again, before its checkpoint is loaded.

        Args:
            folder: of the run.
            show: is told how much is done, and of how much.
            check: ends the program where that was asked for. All processes call it, where no work would be lost.
        """

    def observe(self, forest: Forest) -> Forest:
        raise NotImplementedError

    def take_sampled(self) -> int:
        """Tokens that it has sampled itself and that were not asked for yet; the run counts them as its own."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, `trained` left out."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""


@dataclass(frozen=True)
class Context:
    """What an estimator may be built from.

    Attributes:
        policy: still whole; copies of it are placed by the builder.
        needed: columns that the run reads, whoever adds them.
        rollouts: sampler, judge and growth, for estimators that sample; None where a run has none.
    """

    config: Config
    policy: Policy
    needed: frozenset[str]
    rollouts: Rollouts | None = None
    placement: Placement = UNSHARDED

    @cached_property
    def prm_start(self) -> Policy:
        """What the process reward model starts from: a model of its own, or the policy.

        Raises:
            UserError: it has another vocabulary, or too few positions.
        """
        model = self.config.prm.model
        return self.policy if "prm_logprobs" not in self.needed or model is None else self.load(model, "prm.model")

    def load(self, model: str, option: str) -> Policy:
        """A model that `option` names, which scores the policy's rollouts.

        Raises:
            UserError: it has another vocabulary, or too few positions.
        """
        start = load_model(self.config, model, self.placement, option)
        if start.tokenizer.get_vocab() != self.policy.tokenizer.get_vocab():
            raise UserError(f"{option}: '{model}' has another vocabulary than the policy")
        check_shared_vocabulary(start, self.policy, f"{option}: '{model}'")
        if self.rollouts is not None:
            prompt, new = max(1, self.rollouts.encode.longest), self.config.sampler.max_new_tokens
            whose = f"{option}: '{model}': a prompt of {prompt} tokens and sampler.max_new_tokens {new}"
            check_positions(start.positions, prompt + new, whose)
        return start


@dataclass(frozen=True)
class Load:
    """A model that an estimator holds on every GPU, for the memory plan.

    Attributes:
        name: in the plan, such as "reference".
        model: folder or hub id.
        learns: it has gradients and optimiser state.
        adapted: it has the run's adapters; with the policy's model it shares the rest with it, unless in shards.
    """

    name: str
    model: str
    learns: bool = False
    adapted: bool = False


class Passes(NamedTuple):
    """What an estimator computes in an iteration, in passes over each token of the batch.

    Attributes:
        forward, backward: at most.
        spared: forward passes of these that are left out where the sampler's numbers serve.
    """

    forward: int = 0
    backward: int = 0
    spared: int = 0


Needs = Callable[[Config, Collection[str]], Iterable[str]]
Loads = Callable[[Config, Collection[str]], Iterable[Load]]
CountPasses = Callable[[Config, Collection[str]], Passes]
Builder = Callable[..., Estimator]


@dataclass(frozen=True)
class Declared:
    """What a builder declared; all are asked with the config and the columns that the run reads.

    Attributes:
        own_passes: None: a forward of each model that it holds, and a backward of those that learn.
    """

    needs: Needs = lambda config, needed: ()
    loads: Loads = lambda config, needed: ()
    own_passes: CountPasses | None = None

    def passes(self, config: Config, needed: Collection[str]) -> Passes:
        if self.own_passes is not None:
            return self.own_passes(config, needed)
        loads = list(self.loads(config, needed))
        return Passes(len(loads), sum(load.learns for load in loads))


def provider(
    needs: Needs | Iterable[str] = (), loads: Loads | Iterable[Load] = (), passes: CountPasses | None = None
) -> Callable[[Builder], Builder]:
    """Declare the columns that an estimator reads, and the models that it holds; either may be a function.

    And `passes` over the tokens where they are others than one of each model, backwards where it learns.

    A function for `needs` may raise `UserError` for a config that does not fit, before anything is loaded.
    """
    declared = Declared(
        needs if callable(needs) else lambda config, needed: needs,
        loads if callable(loads) else lambda config, needed: loads,
        passes,
    )

    def declare(builder: Builder) -> Builder:
        builder.declared = declared  # type: ignore[attr-defined]
        return builder

    return declare


def declared(builder: Builder) -> Declared:
    """What a builder declared; one without a declaration reads nothing and holds nothing."""
    return getattr(builder, "declared", Declared())
