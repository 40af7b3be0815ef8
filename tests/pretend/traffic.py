"""Kernels, and bytes that they move outside of matrix products and attention, of a layer of a real shape in an update.

Models of one and of two layers score trees of two sizes, forward and backward, in bf16 by autocast, with gradients to
add to; differences give what one layer costs, for each position and for its weights. What a compiler would join is
counted apart.

python -m pretend.traffic LIBRARY [1.5b ...]         prints JSON
"""

import json
import sys
from pathlib import Path
from typing import Any

from pretend.build import load

SIZES = (256, 512)  # positions, whole blocks of attention
ELSEWHERE = ("mm", "flex", "flash", "embedding")  # operators that the arithmetic stands for


def measure(shapes: list[str]) -> dict[str, Any]:
    from pretend.install import install

    observer = install()
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import torch
    from gpu_stages.shapes import SHAPES, tree_of
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from pretend.observer import MAKES_ROOM, is_view
    from stepcredit.policy.forward import Policy, choose_scoring_form

    class Traffic(TorchDispatchMode):
        moved = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func not in MAKES_ROOM and not is_view(func) and not any(name in str(func) for name in ELSEWHERE):
                leaves = tree_leaves((args, kwargs, result))
                self.moved += sum(one.nbytes for one in leaves if isinstance(one, Tensor) and one.is_cuda)
            return result

    def make(shape: str, layers: int) -> Policy:
        hidden, intermediate, _, heads, kv_heads, _ = SHAPES[shape]
        config = Qwen2Config(
            vocab_size=512,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=True,
        )
        policy = Policy(Qwen2ForCausalLM(config).to("cuda"), None, torch.bfloat16)  # type: ignore[arg-type]
        choose_scoring_form(policy)
        return policy

    def count(policy: Policy, size: int) -> tuple[int, int]:
        """Of the second pass, which adds to the gradients of the first."""
        for _ in range(2):
            observer.clear()
            with Traffic() as traffic:
                policy(tree_of(size)).logprobs.sum().backward()
        return observer.launches.total(), traffic.moved

    found = {}
    with observer:
        for shape in shapes:
            (_, one), (_, two) = (count(make(shape, 1), size) for size in SIZES)
            (launches, three), (_, four) = (count(make(shape, 2), size) for size in SIZES)
            fewer, _ = count(make(shape, 1), SIZES[0])
            each = ((four - two) - (three - one)) / (SIZES[1] - SIZES[0])
            found[shape] = {
                "launches of a layer": launches - fewer,
                "bytes of a layer for each position": each,
                "bytes of a layer for its weights": (three - one) - each * SIZES[0],
            }
    return found


if __name__ == "__main__":
    load(Path(sys.argv[1]))
    print(json.dumps(measure(sys.argv[2:] or ["1.5b"]), indent=1))
