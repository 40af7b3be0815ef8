"""State dictionaries as files: tensors in safetensors, everything else in JSON. Nothing is pickled.

A state is nested dictionaries and lists of tensors, numbers, text, booleans and None. Tensors and floats come back bit
for bit; tuples come back as lists, integer keys of dictionaries as integers.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSOR = "__tensor__"  # a dictionary with this one key stands for a tensor
INTEGERS = "__integers__"  # a dictionary with this one key stands for a dictionary with integer keys


def save_state(state: dict[str, Any], stem: Path) -> None:
    """Write `STEM.json` and `STEM.safetensors`.

    Raises:
        TypeError: a value is of another kind.
    """
    tensors: dict[str, Tensor] = {}
    plain = _split(state, tensors, "")
    save_file(tensors, stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(json.dumps(plain), encoding="utf-8")


def load_state(stem: Path) -> dict[str, Any]:
    """What `save_state` wrote, tensors on the CPU."""
    tensors = load_file(stem.with_suffix(".safetensors"))
    return _join(json.loads(stem.with_suffix(".json").read_text(encoding="utf-8")), tensors)


def _split(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    if isinstance(value, Tensor):
        # safetensors refuses tensors that share memory
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {TENSOR: name}
    if isinstance(value, dict):
        inner = {str(key): _split(item, tensors, f"{name}.{key}".strip(".")) for key, item in value.items()}
        if all(isinstance(key, str) for key in value):
            return inner
        if all(isinstance(key, int) for key in value):
            return {INTEGERS: inner}
        raise TypeError(f"state '{name}': keys are to be all text or all integers")
    if isinstance(value, list | tuple):
        return [_split(item, tensors, f"{name}.{index}".strip(".")) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state '{name}' is a {type(value).__name__}; give tensors, numbers, text, lists or dictionaries")


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {TENSOR}:
        return tensors[value[TENSOR]]
    if set(value) == {INTEGERS}:
        return {int(key): _join(item, tensors) for key, item in value[INTEGERS].items()}
    return {key: _join(item, tensors) for key, item in value.items()}


def random_state() -> dict[str, Any]:
    """Every global random generator. Training has none of its own; a user's functions may use these."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": list(random.getstate()[1]),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def seed_generators(seed: int, rank: int = 0) -> None:
    """Seed every global random generator; those of Python and numpy differ between the processes of a run."""
    random.seed(f"{seed} {rank}")
    np.random.seed([seed, rank])
    torch.manual_seed(seed)


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate((3, tuple(state["python"]), None))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
