"""`stepcredit plan`: the memory that a run takes on each GPU, without a GPU or weights."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from stepcredit.cli.arguments import output_file, parse
from stepcredit.config import Config, resolve
from stepcredit.errors import UserError

if TYPE_CHECKING:
    from stepcredit.plan.memory import Advice, Plan

HELP = """\
usage: stepcredit plan [CONFIG.yaml] --model MODEL --gpus N [--gpu-memory-gib X] [--option value ...]

What a run takes of each GPU's memory, by parts, with whole models on each GPU (ddp) and in shards (fsdp); which of them
fits, which one 'distributed.strategy: auto' takes, and what to change where nothing fits. Needs no GPU and no weights.

  --model MODEL         embedded | folder with a config.json | hub id
  --gpus N              GPUs of the run
  --gpu-memory-gib X    memory of each, 80 when not given; nine tenths of it count as usable
  --json FILE           write the numbers as JSON

Any option of 'stepcredit train' works too. Most depends on

  --algorithm NAME      a reference and a reward model take memory
  --optim.max-tokens-per-micro-batch N    activations; a completion with its prompt is never split
  --train.gradient-checkpointing true     a fraction of them, for a third more arithmetic
  --sampler.max-rows N  --max-new-tokens N  --task.max-prompt-tokens N   keys and values while sampling
  --distributed.strategy NAME  --distributed.cpu-offload true  --lora.rank N

Sizes are at their largest: every completion as long as it may be. Activations are reckoned for decoders like those of
Qwen2, Qwen3 and Llama (stepcredit/parallel/memory.py); for others they are an estimate.

Exit codes: 0 it fits, 1 it does not, 2 the input is wrong.

Examples
  stepcredit plan --model Qwen/Qwen2.5-Math-1.5B --gpus 8 --algorithm spro
  stepcredit plan run.yaml --gpus 4 --gpu-memory-gib 40 --lora.rank 16 --json plan.json"""


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        print(HELP)
        return 0
    given, own = parse(words, {"config": None, "gpus": None, "gpu-memory-gib": "80", "json": None}, "plan")
    out = output_file(own, "json")
    if "gpus" not in own:
        raise UserError("--gpus N is missing; see 'stepcredit plan --help'")
    gpus, gib = _number(own, "gpus"), _number(own, "gpu-memory-gib")
    if gpus != int(gpus):
        raise UserError(f"--gpus: expected a whole number, got {gpus:g}")
    config, gpus = resolve(given), int(gpus)

    from stepcredit.credit import needs_of
    from stepcredit.credit.choose import build_credit
    from stepcredit.losses.choose import build_objective
    from stepcredit.plan import memory
    from stepcredit.processes.ranks import ALONE
    from stepcredit.run.build import build_placement

    credit, _ = build_credit(config.credit)  # these say what does not go together
    build_objective(config, needs_of(credit).forests == "flat")
    build_placement(config, ALONE)
    size = gib * memory.GIB
    plans = {name: memory.reckon(config, gpus, name, size) for name in ("ddp", "fsdp")}
    auto = memory.changed_by(config, {"distributed.strategy": "auto"})
    takes, chosen = memory.chosen(auto, gpus, size), memory.chosen(config, gpus, size)
    plan = plans[chosen]
    budgets = {name: memory.largest_budget(config, one) for name, one in plans.items()}
    advice = [] if plan.fits else memory.advise(config, gpus, size)
    console = Console()
    console.print(_title(config, gpus, gib), highlight=False, soft_wrap=True)
    console.print(_table(plans, budgets))
    for line in _conclusion(config, plan, takes, advice):
        console.print(line, highlight=False, soft_wrap=True)
    if out is not None:
        numbers = _numbers(config, plans, budgets, chosen, takes, advice)
        out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return 0 if plan.fits else 1


def _number(own: dict[str, str], name: str) -> float:
    try:
        value = float(own[name])
    except ValueError as error:
        raise UserError(f"--{name}: '{own[name]}' is not a number") from error
    if not 0 < value < float("inf"):
        raise UserError(f"--{name}: expected a number above 0, got {own[name]}")
    return value


def _title(config: Config, gpus: int, gib: float) -> str:
    from stepcredit.plan.memory import size_of

    billions = size_of(config.model, config.trust_remote_code).weights / 1e9
    count = f"{gpus} GPU" + ("s" if gpus > 1 else "")
    return f"{config.algorithm} on {config.model} ({billions:.3g} B weights), {count} of {gib:g} GiB"


def _table(plans: "dict[str, Plan]", budgets: dict[str, int]) -> Table:
    from stepcredit.plan.memory import ALWAYS, PASS, SAMPLING, STEP

    table = Table(box=None, pad_edge=False)
    table.add_column("GiB on each GPU")
    for name in plans:
        table.add_column(name, justify="right")

    def row(name: str, values: Sequence[float | None], style: str | None = None) -> None:
        table.add_row(name, *("-" if value is None else _gib(value) for value in values), style=style)

    for when in (ALWAYS, SAMPLING, PASS, STEP):
        table.add_row(when, style="bold")
        taken = [{part.name: part.bytes for part in plan.parts if part.when == when} for plan in plans.values()]
        for name in dict.fromkeys(name for found in taken for name in found):
            row(f"  {name}", [found.get(name) for found in taken])
        if when != ALWAYS:
            row("  with what is there all the time", [plan.taken(when) for plan in plans.values()], "bold")
    table.add_row()
    row("peak", [plan.peak for plan in plans.values()], "bold")
    row("usable", [plan.usable for plan in plans.values()])
    table.add_row("fits", *("yes" if plan.fits else "no" for plan in plans.values()), style="bold")
    table.add_row("largest micro-batch that fits, tokens", *(str(budgets[name] or "-") for name in plans))
    return table


def _conclusion(config: Config, plan: "Plan", takes: str, advice: "list[Advice]") -> list[str]:
    from stepcredit.samplers.table import sampler_traits

    asked = config.distributed.strategy
    lines = [f"auto takes {takes}" + ("" if asked in ("auto", takes) else f"; asked for is {asked}")]
    if plan.gpus == 1 and plan.strategy == "fsdp":
        lines.append("on one GPU shards need torchrun, with --nproc-per-node 1")
    if sampler_traits(config).elsewhere:
        lines.append("not counted: the sampler, which computes in another program; it takes memory where it runs")
    if not plan.measured:
        lines.append("activations are an estimate for this kind of model")
    if plan.tokens > config.optim.max_tokens_per_micro_batch:
        lines.append(f"one prompt with its completion may have {plan.tokens} tokens, more than a micro-batch's budget")
    if plan.fits:
        return [*lines, f"it fits: {_gib(plan.peak)} of {_gib(plan.usable)} GiB, the most {plan.tightest}"]
    lines.append(f"it does not fit: {_gib(plan.peak)} of {_gib(plan.usable)} GiB {plan.tightest}")
    if not advice:
        return [*lines, "nothing here helps: take a smaller model, --max-new-tokens or --task.max-prompt-tokens"]
    lines.append("each of these fits:")
    return [*lines, *(f"  {one.options}   ({one.plan.strategy}, {_gib(one.plan.peak)} GiB)" for one in advice)]


def _numbers(
    config: Config,
    plans: "dict[str, Plan]",
    budgets: dict[str, int],
    chosen: str,
    takes: str,
    advice: "list[Advice]",
) -> dict[str, Any]:
    plan = plans[chosen]
    return {
        "model": config.model,
        "algorithm": config.algorithm,
        "gpus": plan.gpus,
        "memory": plan.memory,
        "usable": plan.usable,
        "measured": plan.measured,
        "strategy": chosen,
        "auto": takes,
        "fits": plan.fits,
        "strategies": {
            name: {
                "fits": one.fits,
                "peak": one.peak,
                "tightest": one.tightest,
                "micro_batch_tokens": one.tokens,
                "largest_micro_batch_tokens": budgets[name],
                "rows": one.rows,
                "parts": [{"when": part.when, "name": part.name, "bytes": part.bytes} for part in one.parts],
            }
            for name, one in plans.items()
        },
        "advice": [
            {"options": one.options, "gpus": one.plan.gpus, "strategy": one.plan.strategy, "peak": one.plan.peak}
            for one in advice
        ],
    }


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}" if size >= 0.05 * 2**30 else f"{size / 2**30:.2f}"
