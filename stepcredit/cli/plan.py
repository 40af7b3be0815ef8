"""`stepcredit plan`: the memory that a run takes on each GPU, without a GPU or weights."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from stepcredit.cli.arguments import output_file, parse, read_number
from stepcredit.config import Config, resolve
from stepcredit.errors import UserError

if TYPE_CHECKING:
    from stepcredit.plan.advice import Advice
    from stepcredit.plan.memory import Plan

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

Sizes are at their largest: every completion as long as it may be. Activations are computed for decoders like those of
Qwen2, Qwen3 and Llama (stepcredit/plan/activations.py); for others they are a rough estimate.

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
    gpus, gib = read_number(own, "gpus", above=0), read_number(own, "gpu-memory-gib", above=0)
    if gpus != int(gpus):
        raise UserError(f"--gpus: expected a whole number, got {gpus:g}")
    config, gpus = resolve(given), int(gpus)

    from stepcredit.credit import needs_of
    from stepcredit.credit.choose import build_credit
    from stepcredit.losses.choose import build_objective
    from stepcredit.plan.advice import advise, largest_budget, with_options
    from stepcredit.plan.memory import GIB, chosen_strategy, estimate_memory
    from stepcredit.processes.ranks import SINGLE_PROCESS
    from stepcredit.run.build import build_placement

    credit, _ = build_credit(config.credit)  # these say what does not go together
    build_objective(config, needs_of(credit).forests == "flat")
    build_placement(config, SINGLE_PROCESS)
    memory = gib * GIB
    plans = {strategy: estimate_memory(config, gpus, strategy, memory) for strategy in ("ddp", "fsdp")}
    auto = chosen_strategy(with_options(config, {"distributed.strategy": "auto"}), gpus, memory)
    chosen = chosen_strategy(config, gpus, memory)
    plan = plans[chosen]
    budgets = {strategy: largest_budget(config, plan) for strategy, plan in plans.items()}
    advice = [] if plan.fits else advise(config, gpus, memory)
    console = Console()
    console.print(_title(config, gpus, gib), highlight=False, soft_wrap=True)
    console.print(_table(plans, budgets))
    for line in _conclusion(config, plan, auto, advice):
        console.print(line, highlight=False, soft_wrap=True)
    if out is not None:
        result = _as_json(config, plans, budgets, chosen, auto, advice)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if plan.fits else 1


def _title(config: Config, gpus: int, gib: float) -> str:
    from stepcredit.plan.sizes import size_of

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
        parts = [{part.name: part.bytes for part in plan.parts if part.when == when} for plan in plans.values()]
        for name in dict.fromkeys(name for named in parts for name in named):
            row(f"  {name}", [named.get(name) for named in parts])
        if when != ALWAYS:
            row("  with what is there all the time", [plan.taken(when) for plan in plans.values()], "bold")
    table.add_row()
    row("peak", [plan.peak for plan in plans.values()], "bold")
    row("usable", [plan.usable for plan in plans.values()])
    table.add_row("fits", *("yes" if plan.fits else "no" for plan in plans.values()), style="bold")
    table.add_row("largest micro-batch that fits, tokens", *(str(budgets[name] or "-") for name in plans))
    return table


def _conclusion(config: Config, plan: "Plan", auto: str, advice: "list[Advice]") -> list[str]:
    from stepcredit.samplers.table import sampler_traits

    asked = config.distributed.strategy
    lines = [f"auto takes {auto}" + ("" if asked in ("auto", auto) else f"; asked for is {asked}")]
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


def _as_json(
    config: Config,
    plans: "dict[str, Plan]",
    budgets: dict[str, int],
    chosen: str,
    auto: str,
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
        "auto": auto,
        "fits": plan.fits,
        "strategies": {
            strategy: {
                "fits": other.fits,
                "peak": other.peak,
                "tightest": other.tightest,
                "micro_batch_tokens": other.tokens,
                "largest_micro_batch_tokens": budgets[strategy],
                "rows": other.rows,
                "parts": [{"when": part.when, "name": part.name, "bytes": part.bytes} for part in other.parts],
            }
            for strategy, other in plans.items()
        },
        "advice": [
            {"options": one.options, "gpus": one.plan.gpus, "strategy": one.plan.strategy, "peak": one.plan.peak}
            for one in advice
        ],
    }


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}" if size >= 0.05 * 2**30 else f"{size / 2**30:.2f}"
