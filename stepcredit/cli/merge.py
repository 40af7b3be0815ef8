"""`stepcredit merge`: one model of LoRA adapters and their base."""

from collections.abc import Sequence
from pathlib import Path

from stepcredit.cli.arguments import parse
from stepcredit.errors import UserError

HELP = """\
usage: stepcredit merge --in CHECKPOINT --out FOLDER

The adapters of a run with --lora.rank and the model that they belong to, as one folder that from_pretrained loads.

  --in CHECKPOINT       checkpoint of a run, or any folder with peft adapters (adapter_config.json)
  --out FOLDER          new or empty

Example
  stepcredit merge --in runs/grpo-1/checkpoints/000120 --out my-model"""


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        print(HELP)
        return 0
    given, own = parse(words, {"in": None, "out": None}, "merge")
    if given:
        raise UserError(f"merge: unknown option --{next(iter(given))}; there are --in and --out")
    for name in ("in", "out"):
        if not own.get(name):
            raise UserError(f"merge: --{name} is missing; see 'stepcredit merge --help'")
    source, out = Path(own["in"]), Path(own["out"])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: '{out}' is not empty; name a new folder")

    from stepcredit.learn.adapters import merge_adapters

    merge_adapters(source, out)
    print(f"merged model in {out}; load it with --model {out}")
    return 0
