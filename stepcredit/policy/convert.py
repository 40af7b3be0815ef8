"""A GGUF file as a folder that `from_pretrained` loads, so that what runs in llama.cpp can be trained here."""

import logging
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepcredit.errors import UserError
from stepcredit.policy.weights import UNREADABLE, Names, check_finite, first_line

log = logging.getLogger("stepcredit")

MAGIC = b"GGUF"
READ_WELL = ("default", "gpt-2", "llama-bpe", "qwen2")  # rules of splitting text that transformers reproduces


def convert_gguf(source: Path, out: Path, dtype: torch.dtype = torch.float32) -> int:
    """Write model and tokenizer of a GGUF file as a folder; quantised weights become the numbers that they stand for.

    Args:
        dtype: of the weights that are written. What a quantised weight stands for fits no 16-bit type exactly.

    Returns:
        The number of weights.

    Raises:
        UserError: the file is no GGUF file of a causal language model that transformers reads, lacks weights, or has
            some that are not finite; or the package gguf is missing.
    """
    check_gguf(source)
    folder, name, where = str(source.parent), source.name, f"--in: '{source}'"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except struct.error as error:
        raise UserError(f"{where} is damaged or cut off ({error}); copy or download it again") from error
    except UNREADABLE as error:
        raise UserError(f"{where} cannot be converted ({first_line(error)})") from error
    network, info = loaded
    weights = network.state_dict()
    Names.of_loading(info).check(where, len(weights))
    check_finite(weights, where)
    # What was read calls itself quantised, and could not be saved: a model of the same shape is not.
    network.config.__dict__.pop("quantization_config", None)
    plain = type(network)(network.config)
    plain.load_state_dict(weights)
    plain.tie_weights()
    plain.generation_config = network.generation_config
    plain.to(dtype).save_pretrained(out)
    _split_as(tokenizer, _splitting_rule(source), where)
    tokenizer.save_pretrained(out)
    return sum(value.numel() for value in plain.parameters())


def check_gguf(source: Path) -> None:
    """Refuse what is no GGUF file, and a Python without the package that reads them.

    Raises:
        UserError: either is so.
    """
    if source.is_dir():
        files = sorted(file.name for file in source.glob("*.gguf"))
        hint = f"; it holds {', '.join(files)}" if files else ""
        raise UserError(f"--in: '{source}' is a folder, and a GGUF file is asked for{hint}")
    with source.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"--in: '{source}' is no GGUF file; a folder with config.json needs no conversion")
    if find_spec("gguf") is None:
        raise UserError("convert: reading GGUF files needs the package gguf; pip install 'stepcredit[gguf]'")


def _splitting_rule(source: Path) -> str:
    """How the file says that text is split before it is cut into tokens; "" where it does not say, or need not."""
    from gguf import GGUFReader

    field = GGUFReader(source).get_field("tokenizer.ggml.pre")
    return "" if field is None else str(field.contents())


def _split_as(tokenizer: Any, rule: str, where: str) -> None:
    """Let the tokenizer split text as the file says; transformers goes by the kind of model alone."""
    if rule == "smollm":
        digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    elif rule and rule not in READ_WELL:
        log.warning(
            "%s: its tokenizer splits text by the rule '%s', which is not known here; compare the ids of some texts "
            "with those of the original tokenizer, or copy that one's tokenizer.json into the folder",
            where,
            rule,
        )
