"""Weights that do not learn, held in the type that is computed with: half the memory, and the same numbers.

Under autocast every product rounds its weights to that type, in each pass anew, so those of products can be held in it.
Norms, biases and buffers stay in fp32: a rotary embedding whose frequencies are rounded to bf16 is off by radians at
far positions. So does what a model names in `_keep_in_fp32_modules`. The rows of an embedding, which autocast does not
round, are rounded too (a checkpoint in bf16 loses nothing) and come out in fp32, so that the sums along the layers stay
in fp32 as they are under autocast.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ADAPTERS = "lora_"  # in the names of weights of adapters, which are few and stay as they are


def rounded_weights(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The fp32 weights that may be held in the type of the computation: module, name in it, weight.

    A weight that is tied comes once for each module that has it.
    """
    places = [
        (module, name, value, f"{prefix}.{name}")
        for prefix, module in model.named_modules()
        for name, value in module.named_parameters(recurse=False)
    ]
    stay = {
        id(value)
        for module, _, value, path in places
        if value.ndim < 2
        or value.dtype != torch.float32
        or ADAPTERS in path
        or stays_in_fp32(model, path)
        or (isinstance(module, nn.Embedding) and type(module) is not nn.Embedding)  # one that computes with its rows
    }
    return ((module, name, value) for module, name, value, _ in places if id(value) not in stay)


def stays_in_fp32(model: PreTrainedModel, name: str) -> bool:
    """Whether a model's own code keeps a weight of this name in fp32."""
    kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    return any(f".{words}." in f".{name}." for words in kept)


def hold_in(model: PreTrainedModel, dtype: torch.dtype, device: torch.device | None = None) -> None:
    """Hold the weights of products and embeddings in `dtype`, in place; none of these may learn.

    Args:
        device: where they go meanwhile, one by one; None: nowhere.
    """
    made: dict[int, nn.Parameter] = {}
    for module, name, value in list(rounded_weights(model)):
        if id(value) not in made:
            made[id(value)] = nn.Parameter(value.detach().to(device or value.device, dtype), requires_grad=False)
        setattr(module, name, made[id(value)])
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(_in_fp32)


def _in_fp32(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.float()
