"""`stepcredit warmstart`: build the embedded base model anew and measure it."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stepcredit.cli.arguments import parse
from stepcredit.errors import UserError

HELP = """\
usage: stepcredit warmstart --out FOLDER [--steps N] [--batch-size N] [--seed N] [--num-problems N]

Trains a small Qwen3 from random weights on generated demonstrations of the chain task, writes it as a transformers
folder and prints its accuracy on --num-problems (600) held-out problems. A few minutes on two cores with the defaults.

Examples
  stepcredit warmstart --out base
  stepcredit warmstart --out weaker --steps 1500 --seed 1"""

STEPS, BATCH_SIZE = 3200, 32


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        print(HELP)
        return 0
    own = {"out": None, "steps": str(STEPS), "batch-size": str(BATCH_SIZE), "seed": "0", "num-problems": "600"}
    given, options = parse(words, own, "warmstart")
    if given:
        raise UserError(f"warmstart takes no '{next(iter(given))}'; see 'stepcredit warmstart --help'")
    if "out" not in options:
        raise UserError("--out FOLDER is missing; see 'stepcredit warmstart --help'")
    steps, batch_size = _count("steps", options, 1), _count("batch-size", options, 1)
    seed, out = _count("seed", options, 0), Path(options["out"])
    count = str(_count("num-problems", options, 1))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: '{out}' is not an empty folder")

    out.mkdir(parents=True, exist_ok=True)  # now, not after minutes of training

    from stepcredit.cli.evaluate import main as evaluate_model
    from stepcredit.demo.warmstart import save, warmstart

    console = Console()
    columns = (TextColumn("warm start"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("steps", total=steps, loss=0.0)
        model, tokenizer = warmstart(
            steps, batch_size, seed, lambda step, loss: progress.update(bar, completed=step + 1, loss=loss)
        )
    save(model, tokenizer, out)
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    weights = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{out}: {weights:,} parameters, {size / 1e6:.2f} MB", highlight=False, soft_wrap=True)
    return evaluate_model(
        ["--model", str(out), "--num-problems", count, "--num-samples", "8", "--max-new-tokens", "128"]
    )


def _count(name: str, options: dict[str, str], least: int) -> int:
    if not options[name].isdigit() or int(options[name]) < least:
        raise UserError(f"--{name} must be a whole number of at least {least}, got '{options[name]}'")
    return int(options[name])
