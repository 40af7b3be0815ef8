"""Heads beside the output layer, which read the states of a policy."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepcredit.errors import UserError
from stepcredit.policy.forward import Policy
from stepcredit.policy.weights import check_finite

FILE = "heads.safetensors"


class LinearHead(nn.Module):
    """A few numbers for each state, such as its value: linear, 0 at first, in fp32 whatever the states are."""

    def __init__(self, hidden: int, outputs: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """[n, hidden] to [n], or to [n, outputs] with several outputs."""
        with torch.autocast(states.device.type, enabled=False):
            return self.linear(states.float()).squeeze(-1)


def new_head(policy: Policy, outputs: int = 1) -> LinearHead:
    """A head for the states of a policy, on its device."""
    hidden = policy.model.config.get_text_config().hidden_size
    return LinearHead(hidden, outputs).to(policy.device)


def add_head(policy: Policy, name: str, outputs: int = 1) -> None:
    """Give a policy a head of this name. `policy(forest, head=name)` reads it."""
    policy.heads[name] = new_head(policy, outputs)


def outputs_of(policy: Policy, name: str) -> int:
    """How many numbers a head of `add_head` gives for a state."""
    head: Any = policy.heads[name]
    return int(head.linear.out_features)


def save_heads(state: dict[str, Tensor], folder: Path) -> None:
    """Write the heads' weights beside a model, if there are any."""
    if state:
        save_file({name: value.contiguous() for name, value in state.items()}, folder / FILE)


def saved_heads(folder: Path, option: str = "model") -> dict[str, Tensor]:
    """The weights that `save_heads` wrote; none where there is no file.

    Raises:
        UserError: the file is damaged, or a weight is not finite.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{option}: {file} is damaged or cut off ({error}); copy it again") from error
    check_finite(state, f"{option}: {file}")
    return state


def load_heads(policy: Policy, folder: Path, option: str = "model") -> None:
    """Give a policy the heads that a folder has, with their weights.

    Raises:
        UserError: they are damaged, or not of this model.
    """
    state = saved_heads(folder, option)
    for name in sorted({key.split(".")[0] for key in state} - set(policy.heads)):
        bias = state.get(f"{name}.linear.bias")
        add_head(policy, name, 1 if bias is None else len(bias))
    try:
        policy.heads.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{option}: {folder / FILE} does not fit the model ({str(error).splitlines()[-1]})") from error
