"""Activations: what autograd saves of a forward for the backward, by formulas that tests compare with autograd."""

from stepcredit.plan.sizes import ModelSize


def saved_by_layer(size: ModelSize, mixed: bool = True, sharded: bool = False) -> int:
    """Bytes a token that autograd saves of one layer.

    With hidden size h, intermediate size i, q = heads * head_dim, k = kv heads * head_dim, and a bytes a number:

        queries, keys, values and their output, which is the input of the next product     a (2 q + 2 k)
        log of the sum of exponentiated scores, and two root mean squares, fp32            4 heads + 8
        gate, its activation, up, their product                                            4 a i
        both norms: input, normalised input, output              12 h each in fp32; 8 h each when sharded in bf16
        the same under autocast, where each of the five products casts the output again     2 * 8 h + 5 * 2 h
        norms of queries and keys: in fp32, and normalised               (4 + a) (q + k) + 4 (heads + kv heads)

    Args:
        mixed: computed in bf16.
        sharded: the residual stream is bf16 as well (FSDP2 casts what goes into a layer).
    """
    a = 2 if mixed else 4
    queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
    norms = 24 if not mixed else 16 if sharded else 26
    saved = norms * size.hidden + a * (2 * queries + 2 * keys) + 4 * size.heads + 8 + 4 * a * size.intermediate
    if size.qk_norm:
        saved += (4 + a) * (queries + keys) + 4 * (size.heads + size.kv_heads)
    return saved


def saved_by_checkpoint(size: ModelSize, mixed: bool = True, sharded: bool = False) -> int:
    """Bytes a token that autograd saves of a checkpointed layer: its input."""
    return (2 if mixed and sharded else 4) * size.hidden


def saved_outside(size: ModelSize, mixed: bool = True, sharded: bool = False) -> int:
    """Bytes a token that autograd saves outside the layers: the last norm, states, rotary angles, numbers of tokens."""
    return (8 if mixed and sharded else 12) * size.hidden + 8 * size.head_dim + 32
