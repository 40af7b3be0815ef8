"""Models of real shapes with random weights, and forests of many forms."""

import json
from pathlib import Path

import torch
from forest import Case
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.policy.forward import Policy, choose_scoring_form

SHAPES = {  # hidden, intermediate, layers, heads, heads of keys and values, vocabulary
    "tiny": (64, 192, 2, 4, 2, 512),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
}
CASES = {
    "group 8 x 512 behind 256": Case(prompt=256, branches=8, depth=1, tokens=512, trees=4),
    "group 8 x 512 behind 2048": Case(prompt=2048, branches=8, depth=1, tokens=512, trees=2),
    "tree 4^3 x 128": Case(prompt=256, branches=4, depth=3, tokens=128, trees=2),
    "tree 8^3 x 64": Case(prompt=256, branches=8, depth=3, tokens=64, trees=1),
}
SMALL = {
    "group 8 x 16 behind 32": Case(prompt=32, branches=8, depth=1, tokens=16, trees=2),
    "tree 4^3 x 4": Case(prompt=32, branches=4, depth=3, tokens=4, trees=1),
}
PAD, STOP = 0, 1


def network(shape: str) -> Qwen2ForCausalLM:
    """With fp32 weights, on the default device."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        eos_token_id=STOP,
        pad_token_id=PAD,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config)


def tokenizer(shape: str) -> PreTrainedTokenizerFast:
    """A word for every token."""
    words = {"<pad>": PAD, "<stop>": STOP} | {f"w{number}": number for number in range(2, SHAPES[shape][-1])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<stop>")


def make_policy(shape: str, device: torch.device, bf16: bool = True) -> Policy:
    """A policy as `load_policy` makes it, in the form that the device takes."""
    with device:
        model = network(shape)
    policy = Policy(model, tokenizer(shape), torch.bfloat16 if bf16 else None)
    choose_scoring_form(policy)
    return policy


def make_folder(shape: str, folder: Path, prompts: int, length: int, device: torch.device) -> Path:
    """Model, tokenizer and prompts of random words, as files that every trainer reads."""
    with device:
        model = network(shape)
    model.save_pretrained(folder)
    tokenizer(shape).save_pretrained(folder)
    ids = random_ids(shape, prompts, length)
    rows = [{"id": str(number), "question": " ".join(f"w{one}" for one in row)} for number, row in enumerate(ids)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def load(folder: Path) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Model, with fp32 weights, and tokenizer of `make_folder`; `AutoTokenizer` would take Qwen2's own."""
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def random_ids(shape: str, rows: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, SHAPES[shape][-1], (rows, length), generator=generator).tolist()


def tree_of(positions: int) -> Forest:
    """A tree of about so many positions in a packed row: a prompt, three branches, two leaves on the first."""
    piece = max(1, positions // 6)
    prompt = max(1, positions - 5 * piece + 4)  # the last token of each of the four leaves is left out of a row
    segments = [Segment([1] * piece, finish="cut"), Segment([1] * piece), Segment([1] * piece)]
    segments += [Segment([1] * piece, parent=0), Segment([1] * piece, parent=0)]
    return Forest.from_trees([Tree(Problem(id="0"), [1] * prompt, segments)])
