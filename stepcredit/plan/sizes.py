"""Sizes of a model, counted from its config without its weights."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from stepcredit.errors import UserError
from stepcredit.policy.loading import source_of

MEASURED = ("llama", "qwen2", "qwen3")  # kinds of models whose activations the formula was compared with


@dataclass(frozen=True)
class ModelSize:
    """The shape of a model, as far as memory depends on it.

    Attributes:
        weights: all, tied ones once; largest_layer: those of one layer; outside: those outside the layers.
        linear: weights of adapters of rank 1, by name of the linear layer.
        qk_norm: queries and keys are normalised.
        measured: the formula for activations holds; otherwise it is an estimate.
    """

    weights: int
    largest_layer: int
    outside: int
    linear: dict[str, int]
    layers: int
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool
    measured: bool


@cache
def size_of(model: str, trust_remote_code: bool = False) -> ModelSize:
    """Count a model's weights without loading them; a folder needs no more than its config.json.

    Raises:
        UserError: its config cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = source_of(model, config_only=True)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model: cannot read the config of '{model}' ({why})") from error
    network.tie_weights()
    return size_of_network(network)


def size_of_network(network: Any) -> ModelSize:
    """The shape of a transformers model, which may be on the meta device."""
    names = set(network._no_split_modules or ())
    layers = [module for module in network.modules() if type(module).__name__ in names]
    sizes = [sum(value.numel() for value in layer.parameters()) for layer in layers]
    total = sum(value.numel() for value in network.parameters())
    head = network.get_output_embeddings()
    linear: dict[str, int] = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            last = name.split(".")[-1]
            linear[last] = linear.get(last, 0) + module.in_features + module.out_features
    config = network.config.get_text_config()
    vocabulary, hidden = head.weight.shape
    heads = getattr(config, "num_attention_heads", None) or max(1, hidden // 64)
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    if experts := getattr(config, "num_experts_per_tok", None):
        wide = experts * (getattr(config, "moe_intermediate_size", None) or wide)
    return ModelSize(
        weights=total,
        largest_layer=max(sizes, default=total),
        outside=total - sum(sizes),
        linear=linear,
        layers=len(layers) or getattr(config, "num_hidden_layers", 1),
        vocabulary=vocabulary,
        hidden=hidden,
        intermediate=wide,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        qk_norm=any(name.endswith("q_norm") for name, _ in network.named_modules()),
        measured=config.model_type in MEASURED,
    )
