"""Loading and saving policies: the embedded model, a local folder or a hub id."""

import copy
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.core_model_loading import revert_weight_conversion

from stepcredit.errors import UserError
from stepcredit.policy.forward import Policy, ScoringForm, check_causal, choose_scoring_form
from stepcredit.policy.heads import HeadForm, add_head, form_of, load_heads
from stepcredit.policy.limits import check_vocabulary
from stepcredit.policy.weights import ADAPTER, ADAPTER_WEIGHTS, UNREADABLE, load_network, why_unreadable

log = logging.getLogger("stepcredit")

EMBEDDED_MODEL = Path(__file__).parents[1] / "demo" / "model"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"train.device: '{name}' is not available here; use auto or cpu") from error
    return device


def source_of(model: str, config_only: bool = False, option: str = "model") -> str:
    """The folder or hub id that a model's name stands for.

    Args:
        config_only: a folder needs neither weights nor tokenizer.
        option: that named it, for messages.

    Raises:
        UserError: it is neither, or the folder lacks a model or a tokenizer.
    """
    source = str(EMBEDDED_MODEL) if model == "embedded" else model
    folder = Path(source)
    if folder.is_dir():
        _check_folder(folder, config_only, option)
    elif folder.suffix == ".gguf":
        raise UserError(
            f"{option}: '{model}' is a GGUF file; make a folder of it: stepcredit convert --in {model} --out FOLDER"
        )
    elif folder.exists() or model.startswith(".") or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UserError(
            f"{option}: '{model}' is no folder; give one with model and tokenizer, a hub id OWNER/NAME, or embedded"
        )
    return source


def load_policy(
    model: str,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    home: torch.device | None = None,
    option: str = "model",
) -> Policy:
    """A policy with fp32 weights, all of them read, checked against the model's own logits.

    Args:
        model: "embedded", a folder with model and tokenizer, or a hub id.
        dtype: of the computation, by autocast: "float32", "bfloat16", or "auto" (bfloat16 on CUDA).
        trust_remote_code: run code that comes with the model.
        home: the device that it will compute on, where it is not to be loaded there.
        option: that named it, for messages.

    Raises:
        UserError: the folder, the model or the tokenizer is missing or cannot be loaded; weights are missing, of
            another size or not finite; embedding and output layer have different numbers of tokens; or it is not a
            causal language model with keys and values.
    """
    source = source_of(model, option=option)
    where = pick_device(device)
    network = load_network(source, option, trust_remote_code=trust_remote_code)
    tokenizer = _tokenizer(source, f"{option}: '{model}'", trust_remote_code)
    policy = policy_of(network.to(where), tokenizer, autocast_type(dtype, home or where), f"{option}: '{model}'")  # type: ignore[arg-type]
    load_heads(policy, Path(source), option)
    choose_scoring_form(policy, home=home)
    return policy


def policy_of(network: Any, tokenizer: Any, autocast: torch.dtype | None, where: str) -> Policy:
    """A policy of a model in memory; `choose_scoring_form` is to be called next.

    Args:
        where: begins the message, such as "model: 'my-folder'".

    Raises:
        UserError: it is not a causal language model with keys and values, or embedding and output layer have different
            numbers of tokens.
    """
    if not all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=network.config).layers):
        raise UserError(
            f"{where} ({network.config.model_type}) keeps states other than keys and values (recurrent or "
            "convolution layers); choose a model of attention layers only"
        )
    if network.generation_config is not None and network.can_generate():
        network.generation_config.do_sample = True  # some models set a temperature without it and could not be saved
    policy = Policy(network, tokenizer, autocast)
    check_vocabulary(policy, where)
    check_causal(policy, where)
    return policy


def autocast_type(dtype: str, device: torch.device) -> torch.dtype | None:
    """What `train.dtype` asks for on a device."""
    return torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda") else None


def _tokenizer(source: str, where: str, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        raise UserError(f"{where} has no tokenizer to load ({why_unreadable(source, error)})") from error


# ---------------------------------------------------------------------- without weights


@dataclass(frozen=True)
class Loaded:
    """What is known of a policy that was loaded, beside its weights.

    Attributes:
        heads: what each head gives for a state.
        tensors: name, shape and type of its weights and buffers; tied ones once.
    """

    scoring_form: ScoringForm
    generation_config: Any
    heads: dict[str, HeadForm]
    tensors: list[tuple[str, tuple[int, ...], torch.dtype]]

    @classmethod
    def of(cls, policy: Policy) -> "Loaded":
        tensors = [
            (name, tuple(value.shape), value.dtype)
            for name, value in (*policy.named_parameters(), *policy.named_buffers())
        ]
        heads = {name: form_of(policy, name) for name in policy.heads}
        return cls(policy.scoring_form, policy.model.generation_config, heads, tensors)


def empty_policy(
    model: str, loaded: Loaded, dtype: str, home: torch.device, trust_remote_code: bool = False
) -> Policy | None:
    """A policy like one that another process has loaded, without weights (on the meta device).

    Returns:
        None where it cannot be made from the model's config alone.
    """
    source = source_of(model)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
            network.tie_weights()
    except UNREADABLE as error:
        log.debug("'%s' cannot be made without weights: %r", model, error)
        return None
    network.generation_config, network.name_or_path = loaded.generation_config, source
    tokenizer = _tokenizer(source, f"model: '{model}'", trust_remote_code)
    policy = Policy(network, tokenizer, autocast_type(dtype, home))
    for name, form in loaded.heads.items():
        add_head(policy, name, *form)
    policy.scoring_form = loaded.scoring_form
    return policy if Loaded.of(policy).tensors == loaded.tensors else None


def _check_folder(folder: Path, config_only: bool, option: str) -> None:
    def holds(*patterns: str) -> bool:
        return any(any(folder.glob(pattern)) for pattern in patterns)

    if config_only:
        if not holds("config.json"):
            raise UserError(f"{option}: folder '{folder}' holds no config.json")
        return
    if holds(ADAPTER) and not holds(*ADAPTER_WEIGHTS, *WEIGHT_FILES):
        raise UserError(
            f"{option}: folder '{folder}' holds {ADAPTER} and no {ADAPTER_WEIGHTS[0]}; copy the whole folder"
        )
    if not holds("config.json", ADAPTER) or not holds(*ADAPTER_WEIGHTS, *WEIGHT_FILES):
        raise UserError(f"{option}: folder '{folder}' holds no model (config.json and *.safetensors)")
    if not holds(*TOKENIZER_FILES):
        raise UserError(f"{option}: folder '{folder}' holds no tokenizer (tokenizer.json)")


def frozen_copy(policy: Policy) -> Policy:
    """A copy that is never trained: the reference."""
    return copy.deepcopy(policy).requires_grad_(False)


def checkpoint_tensors(policy: Policy, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names, and in the pieces, of a folder that `save_policy` writes; tied ones once."""
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, value in state.items():
        key = (value.data_ptr(), tuple(value.shape))
        if key not in seen or not value.numel():
            found[name] = value
        seen.add(key)
    return revert_weight_conversion(policy.model, found)


def save_policy(policy: Policy, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write model and tokenizer as a folder that `from_pretrained` loads; of a model with adapters these alone.

    Args:
        state: the weights, where the model itself holds shards of them.
    """
    policy.model.save_pretrained(folder, state_dict=state)
    policy.tokenizer.save_pretrained(folder)
