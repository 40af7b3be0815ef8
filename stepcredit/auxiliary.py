"""AuxModels: they observe a forest and add columns to it before credit is assigned."""

from typing import Any, Protocol

from stepcredit.forest import Forest
from stepcredit.policy.forward import Policy, score
from stepcredit.policy.loading import frozen_copy


class AuxModel(Protocol):
    """Adds columns to a forest and, where it learns, updates itself while doing so."""

    def observe(self, forest: Forest) -> Forest: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class OldPolicy:
    """Adds `old_logprobs`: the policy at the start of the iteration, by the trainer's own forward."""

    def __init__(self, policy: Policy, temperature: float, max_tokens: int) -> None:
        self.policy, self.temperature, self.max_tokens = policy, temperature, max_tokens

    def observe(self, forest: Forest) -> Forest:
        return forest.with_token(old_logprobs=score(self.policy, forest, self.temperature, self.max_tokens).logprobs)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing of its own: the policy is saved elsewhere."""


class Reference:
    """Adds `ref_logprobs`: the policy as it was when training began, frozen."""

    def __init__(self, policy: Policy, temperature: float, max_tokens: int) -> None:
        self.policy, self.temperature, self.max_tokens = frozen_copy(policy), temperature, max_tokens

    def observe(self, forest: Forest) -> Forest:
        return forest.with_token(ref_logprobs=score(self.policy, forest, self.temperature, self.max_tokens).logprobs)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing of its own: a resumed run starts from the same model folder."""
