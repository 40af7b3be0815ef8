"""What entropies of the tokens decide: which advantages count, and how much the entropy bonus weighs.

Both read the column `entropy`, of the policy at the start of the iteration, over all tokens that are trained on, so
that neither micro-batches, nor minibatches, nor processes change anything.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from stepcredit.forest import Forest
from stepcredit.losses.options import ObjectiveOptions


def top_entropy(entropy: Tensor, where: Tensor, share: float) -> Tensor:
    """[num_tokens] True for the tokens of `where` with the largest entropies: at or above their (1 - share) quantile.

    The quantile lies between two tokens, so that of n tokens those count that have at most floor((n - 1) share) others
    above them, and those as large as the last of them.

    >>> import torch
    >>> top_entropy(torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7]), torch.ones(5, dtype=torch.bool), 0.5).tolist()
    [False, True, True, False, True]
    """
    values = entropy[where]
    if not len(values):
        return where
    below = math.ceil((len(values) - 1) * (1 - share) - 1e-9)
    return where & (entropy >= values.sort().values[below])


def with_top_entropy(forest: Forest, share: float) -> Forest:
    """Advantages outside the top share of entropies become 0; the tokens stay in the denominators (arXiv 2506.01939).

    The paper takes a share of 0.2, and its threshold over the batch. TRL's is of a micro-batch of all processes.
    """
    if share >= 1:
        return forest
    top = top_entropy(forest.token["entropy"], forest.active, share)
    columns = [name for name in ("advantages", "process") if name in forest.token]
    return forest.with_token(**{name: forest.token[name] * top for name in columns})


class EntropyControl:
    """The coefficient of the entropy bonus, which follows a target (Skywork-OR1, arXiv 2505.22312).

        alpha_k = c_k if e_k <= target else 0
        c_{k+1} = c_k + step if e_k <= target else c_k - step, within 0 and `entropy_coef_max`

    k counts iterations, e_k is the mean entropy of the tokens that are trained on. c_0 is `entropy_coef`. Without a
    target the coefficient is `entropy_coef` throughout. TRL has the same, with the entropy of the step before and one
    change for each optimiser step, and under its top_entropy_quantile over those tokens alone.

    Attributes:
        coef: c of the next iteration.
        used: alpha of this one.
    """

    def __init__(self, given: ObjectiveOptions) -> None:
        self.given = given
        self.coef = self.used = given.entropy_coef

    def begin(self, forest: Forest) -> dict[str, float]:
        """Take the coefficient of an iteration, and make the next one. Its metrics."""
        given = self.given
        active = forest.active
        if given.entropy_target is None or not bool(active.any()):
            return {}
        low = float(forest.token["entropy"][active].double().mean()) <= given.entropy_target
        self.used = self.coef if low else 0.0
        moved = self.coef + (given.entropy_step if low else -given.entropy_step)
        self.coef = min(max(moved, 0.0), given.entropy_coef_max)
        return {"policy/entropy_coef": self.used}

    def state_dict(self) -> dict[str, float]:
        return {} if self.given.entropy_target is None else {"coef": self.coef, "used": self.used}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """The inverse of `state_dict`; a run that had no target begins with `entropy_coef`."""
        if self.given.entropy_target is not None and state:
            self.coef, self.used = state["coef"], state["used"]
