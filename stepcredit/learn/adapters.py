"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: only they are trained; switched off, they leave the reference."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from stepcredit.errors import UserError
from stepcredit.learn.placement import copy_into
from stepcredit.policy.forward import Policy

ADAPTER = "adapter_config.json"


def add_adapters(policy: Policy, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Freeze a policy and add adapters to it, which change no output yet, in place.

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


def has_adapters(policy: Policy) -> bool:
    return bool(getattr(policy.model, "_hf_peft_config_loaded", False))


def load_adapters(policy: Policy, folder: Path) -> None:
    """Load the adapters of a folder into a policy that has adapters."""
    file = load_file(folder / "adapter_model.safetensors")
    saved = {name.removeprefix("base_model.model."): value for name, value in file.items()}
    weights = {name.replace(".default.", "."): value for name, value in policy.model.named_parameters()}
    with torch.no_grad():
        for name, value in weights.items():
            if value.requires_grad:
                copy_into(value, saved[name])


@contextmanager
def adapters_off(policy: Policy) -> Iterator[None]:
    """The base model inside the block."""
    policy.model.disable_adapters()
    try:
        yield
    finally:
        policy.model.enable_adapters()


def trainable_copy(policy: Policy, share_frozen: bool) -> Policy:
    """A copy that is trained independently.

    Args:
        share_frozen: the copy uses the same tensors for weights that are not trained.
    """
    shared = [value for value in policy.parameters() if share_frozen and not value.requires_grad]
    made = copy.deepcopy(policy, {id(value): value for value in shared})
    return made if has_adapters(policy) else made.requires_grad_(True)


def merge_adapters(folder: Path, out: Path) -> None:
    """Merge a folder's adapters into their base model and write it as a folder that `from_pretrained` loads.

    Raises:
        UserError: the folder holds no adapters, or their base cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not (folder / ADAPTER).is_file():
        raise UserError(f"merge: '{folder}' holds no adapters ({ADAPTER}); give a checkpoint of a run with --lora.rank")
    config = LoraConfig.from_pretrained(str(folder))
    base = str(config.base_model_name_or_path)
    try:
        network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
            merged = PeftModel.from_pretrained(network, str(folder)).merge_and_unload()
        merged.save_pretrained(out)
        AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    except (OSError, ValueError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"merge: cannot put the adapters of '{folder}' onto '{base}' ({why})") from error
