"""`stepcredit convert`: a GGUF file as a folder that can be trained."""

from collections.abc import Sequence
from pathlib import Path

from stepcredit.cli.arguments import parse
from stepcredit.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
HELP = """\
usage: stepcredit convert --in FILE.gguf --out FOLDER [--dtype float32|bfloat16|float16]

A model of llama.cpp (GGUF, quantised or not) as a folder with model, tokenizer and chat template, which
from_pretrained loads. Weights of 4 bits become the numbers that they stand for: the folder is as good as the file, and
as large as the model. Needs the package gguf: pip install 'stepcredit[gguf]'.

  --in FILE             one whole file; those in parts (-00001-of-00002.gguf) are put together by llama-gguf-split first
  --out FOLDER          new or empty
  --dtype TYPE          of the weights that are written; float32 loses nothing   [float32]

Example
  stepcredit convert --in SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
  stepcredit train --model smollm2 --data gym:chain_sum --task.gym-answer line"""


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        print(HELP)
        return 0
    given, own = parse(words, {"in": None, "out": None, "dtype": "float32"}, "convert")
    if given:
        raise UserError(f"convert: unknown option --{next(iter(given))}; there are --in, --out and --dtype")
    for name in ("in", "out"):
        if not own.get(name):
            raise UserError(f"convert: --{name} is missing; see 'stepcredit convert --help'")
    source, out = Path(own["in"]), Path(own["out"])
    if own["dtype"] not in DTYPES:
        raise UserError(f"--dtype: '{own['dtype']}' is none of {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: '{out}' is not empty; name a new folder")
    if not source.exists():
        raise UserError(f"--in: there is no file '{source}'")

    import torch

    from stepcredit.policy.convert import convert_gguf

    count = convert_gguf(source, out, getattr(torch, own["dtype"]))
    print(f"{count / 1e6:.1f} million weights in {out}; load them with --model {out}")
    return 0
