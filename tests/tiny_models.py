"""Tiny random policies built from configs in memory, and random forests; made once per process."""

from functools import cache
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor

from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.policy.forward import Policy

VOCABULARY = 97
STOP = 2
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": STOP,
    "pad_token_id": 0,
    "bos_token_id": None,
}
FAMILIES = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False, "num_hidden_layers": 3}),
    "llama": ("Llama", {"tie_word_embeddings": False, "hidden_size": 64, "head_dim": 16, "initializer_range": 0.15}),
}
CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
LAYERS = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
OTHERS = {  # scaled and capped logits, windows, experts
    "granite": ("Granite", {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7}),
    "cohere": ("Cohere", {"logit_scale": 0.3, "hidden_size": 32}),
    "gemma2": ("Gemma2", CAPS | LAYERS | {"sliding_window": 5}),
    "gemma3": (
        "Gemma3Text",
        LAYERS | {"sliding_window": 5, "query_pre_attn_scalar": 8, "use_bidirectional_attention": False},
    ),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "phi3": ("Phi3", {"sliding_window": 7, "num_key_value_heads": 4}),
    "mixtral": ("Mixtral", EXPERTS),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True, "decoder_sparse_step": 1}),
}
MODEL_NAMES = {"Gemma3Text": "Gemma3"}


def fresh(family: str, seed: int = 0, **changes) -> Policy:
    """A new policy of this family; give changes to its config."""
    name, options = (FAMILIES | OTHERS).get(family) or (family, {})
    config = getattr(transformers, f"{name}Config")(**SHAPE | options | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{MODEL_NAMES.get(name, name)}ForCausalLM")(config)
        with torch.no_grad():  # biases and norms start at 0 and 1: move them, so that they matter
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return Policy(model, SimpleNamespace(eos_token_id=STOP))  # type: ignore[arg-type]


@cache
def tiny(family: str) -> Policy:
    """The shared policy of this family, on the forest path; do not change it."""
    return fresh(family)


def random_trees(seed: int, deep: bool, num_trees: int = 3, unsampled: float = 0.0) -> list[Tree]:
    """Ragged trees; flat ones are groups of completions, deep ones branch at random."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def tokens(count: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()

    trees = []
    for number in range(num_trees):
        segments = [
            Segment(
                tokens(whole(1, 7)),
                parent=whole(-1, index - 1) if deep else -1,
                sampled=whole(1, 1000) > 1000 * unsampled,
            )
            for index in range(whole(5, 8) if deep else whole(1, 5))
        ]
        trees.append(Tree(Problem(id=f"{'deep' if deep else 'flat'}-{number}"), tokens(whole(1, 12)), segments))
    return trees


def random_forest(seed: int, deep: bool, num_trees: int = 3, unsampled: float = 0.0) -> Forest:
    return Forest.from_trees(random_trees(seed, deep, num_trees, unsampled))


def reference_scores(policy: Policy, forest: Forest, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies by the shortest code: one row at a time through the model's own logits."""
    logprobs: list[Tensor] = [torch.zeros(())] * forest.num_tokens
    entropy: list[Tensor] = [torch.zeros(())] * forest.num_tokens
    row = 0
    for tree in forest.to_trees():
        for segment in tree.segments:
            before, above = [], segment.parent
            while above >= 0:
                before = [*tree.segments[above].token_ids, *before]
                above = tree.segments[above].parent
            ids = [*tree.prompt_ids, *before, *segment.token_ids]
            if segment.sampled:
                states = policy.model(torch.tensor([ids])).logits[0] / temperature
                full = torch.log_softmax(states, -1)
                for offset, token in enumerate(segment.token_ids):
                    at = full[len(ids) - len(segment.token_ids) + offset - 1]
                    logprobs[row + offset] = at[token]
                    entropy[row + offset] = -(at.exp() * at).sum()
            row += len(segment.token_ids)
    return torch.stack(logprobs), torch.stack(entropy)


def gradients(policy: Policy, loss: Tensor) -> Tensor:
    """All gradients of the policy's weights as one vector."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(parameter) if grad is None else grad).flatten()
            for parameter, grad in zip(parameters, found, strict=True)
        ]
    )


def relative_distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
