"""Heads beside the output layer, which read the states of a policy."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepcredit.errors import UserError
from stepcredit.policy.forward import Policy
from stepcredit.policy.weights import check_finite

FILE = "heads.safetensors"


class HeadForm(NamedTuple):
    """How many numbers a head gives for a state, and what they are; "" where nobody said."""

    outputs: int = 1
    kind: str = ""


class LinearHead(nn.Module):
    """A few numbers for each state, such as its value: linear, 0 at first, in fp32 whatever the states are."""

    def __init__(self, hidden: int, outputs: int = 1, kind: str = "") -> None:
        super().__init__()
        self.form = HeadForm(outputs, kind)
        self.linear = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """[n, hidden] to [n], or to [n, outputs] with several outputs."""
        with torch.autocast(states.device.type, enabled=False):
            return self.linear(states.float()).squeeze(-1)


def new_head(policy: Policy, outputs: int = 1, kind: str = "") -> LinearHead:
    """A head for the states of a policy, on its device."""
    hidden = policy.model.config.get_text_config().hidden_size
    return LinearHead(hidden, outputs, kind).to(policy.device)


def add_head(policy: Policy, name: str, outputs: int = 1, kind: str = "") -> None:
    """Give a policy a head of this name. `policy(forest, head=name)` reads it."""
    policy.heads[name] = new_head(policy, outputs, kind)


def form_of(policy: Policy, name: str) -> HeadForm:
    """What a head of `add_head` gives for a state."""
    head: Any = policy.heads[name]
    form: HeadForm = head.form
    return form


def save_heads(policy: Policy, state: dict[str, Tensor], folder: Path) -> None:
    """Write the weights of a policy's heads beside its model, if there are any, and what kinds they are."""
    if state:
        kinds = {name: form_of(policy, name).kind for name in policy.heads}
        save_file({name: value.contiguous() for name, value in state.items()}, folder / FILE, metadata=kinds)


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
    kinds: dict[str, str] = {}
    if state:
        with safe_open(folder / FILE, "pt") as file:
            kinds = file.metadata() or {}
    for name in sorted({key.split(".")[0] for key in state} - set(policy.heads)):
        bias = state.get(f"{name}.linear.bias")
        add_head(policy, name, 1 if bias is None else len(bias), kinds.get(name, ""))
    try:
        policy.heads.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{option}: {folder / FILE} does not fit the model ({str(error).splitlines()[-1]})") from error
