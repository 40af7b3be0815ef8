"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: only they are trained; switched off, they leave the reference."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from stepcredit.errors import UserError
from stepcredit.learn.spread import copy_into, shared_copy
from stepcredit.policy.forward import Policy
from stepcredit.policy.precision import hold_in
from stepcredit.policy.weights import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    UNREADABLE,
    Names,
    adapter_base,
    check_adapters,
    check_finite,
    load_network,
    why_unreadable,
)


def add_adapters(policy: Policy, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Freeze a policy and add adapters to it, which change no output yet, in place.

    Under autocast the frozen weights are held in its type from now on (`policy/precision.py`).

    Args:
        targets: names of linear layers; empty takes all but the output layer.

    Raises:
        UserError: the model already has adapters, or has no such layer.
    """
    if has_adapters(policy):
        raise UserError("model: it has adapters; make one model of them with 'stepcredit merge', then train that")
    names = list(targets) or "all-linear"
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    with torch.random.fork_rng():  # the same adapters in every process and every run of a seed
        torch.manual_seed(seed)
        try:
            policy.model.add_adapter(config)
        except ValueError as error:
            linear = sorted({n.split(".")[-1] for n, m in policy.model.named_modules() if isinstance(m, nn.Linear)})
            raise UserError(f"lora.targets: no layer has this name; there are {', '.join(linear)} ({error})") from error
    for name, value in policy.model.named_parameters():
        value.requires_grad_("lora_" in name)
        if value.requires_grad:
            value.data = value.data.float()
    if policy.autocast is not None:
        hold_in(policy.model, policy.autocast)


def has_adapters(policy: Policy) -> bool:
    return bool(getattr(policy.model, "_hf_peft_config_loaded", False))


def load_adapters(policy: Policy, folder: Path, option: str = "model") -> None:
    """Bring a policy's adapters to where a folder has them.

    Raises:
        UserError: they cannot be read, are not all those of the policy, or are not finite.
    """
    where = f"{option}: '{folder}'"
    try:
        saved = load_file(folder / ADAPTER_WEIGHTS[0])
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where} has no adapters that can be read ({why_unreadable(str(folder), error)})") from error
    given = {name.removeprefix("base_model.model."): value for name, value in saved.items()}
    named = {name.replace(".default.", "."): value for name, value in policy.model.named_parameters()}
    learning = {name: value for name, value in named.items() if value.requires_grad}
    check_adapters(Names.between(given, learning), where, len(learning), policy.model.name_or_path)
    check_finite(given, where)
    with torch.no_grad():
        for name, value in learning.items():
            copy_into(value, given[name])


@contextmanager
def adapters_off(policy: Policy) -> Iterator[None]:
    """The base model inside the block."""
    policy.model.disable_adapters()
    try:
        yield
    finally:
        policy.model.enable_adapters()


def trainable_copy(policy: Policy, share_frozen: bool, until_sharded: bool = False) -> Policy:
    """A copy that is trained independently.

    Args:
        share_frozen: the copy uses the same tensors for weights that are not trained.
        until_sharded: it will be sharded next, and uses the same tensors for all weights until then.
    """
    if until_sharded:
        made = shared_copy(policy)
        return made if has_adapters(policy) else made.requires_grad_(True)
    shared = [value for value in policy.parameters() if share_frozen and not value.requires_grad]
    made = copy.deepcopy(policy, {id(value): value for value in shared})
    return made if has_adapters(policy) else made.requires_grad_(True)


def merge_adapters(folder: Path, out: Path) -> None:
    """Merge a folder's adapters into their base model and write it as a folder that `from_pretrained` loads.

    Raises:
        UserError: the folder holds no adapters, or not all of them, or their base cannot be loaded.
    """
    where = f"merge: '{folder}'"
    if not (folder / ADAPTER).is_file():
        raise UserError(f"{where} holds no adapters ({ADAPTER}); give a checkpoint of a run with --lora.rank")
    if not any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
        raise UserError(f"{where} holds {ADAPTER} and no {ADAPTER_WEIGHTS[0]}; copy the whole folder")
    base = str(adapter_base(str(folder), "merge"))
    network = load_network(base, f"merge: the base of '{folder}'")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks transformers by an old name; missing weights are checked below
            adapted = PeftModel.from_pretrained(network, str(folder))
        read, wanted = load_peft_weights(str(folder), device="cpu"), get_peft_model_state_dict(adapted)
        check_adapters(Names.between(read, wanted), where, len(wanted), base)
        check_finite(read, where)
        adapted.merge_and_unload().save_pretrained(out)
        AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    except UNREADABLE as error:
        why = why_unreadable(str(folder), error)
        raise UserError(f"merge: cannot put the adapters of '{folder}' onto '{base}' ({why})") from error
