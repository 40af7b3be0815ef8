"""`stepcredit algorithms`: what there is to train with, what it needs and what it costs."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stepcredit.cli.arguments import split
from stepcredit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from stepcredit.estimators.base import Passes
    from stepcredit.plan.algorithms import AlgorithmFacts

HELP = """\
usage: stepcredit algorithms [NAME ...] [--json] [--markdown]

The algorithms of --algorithm: what each needs beside the policy and the answers, and what it costs. With names: the
formula, the paper, and the config that each amounts to, for a model of your own.

  --json                as JSON
  --markdown            the table as it stands in README.md

passes    forward and backward passes over each token of the batch in an iteration, prompts too, sampling left out.
          1-2: one of them is left out where the sampler's log-probabilities agree with the trainer's
bytes     of models, gradients and optimiser state for each weight of the policy, fp32 on one GPU; activations and keys
          and values come on top, see 'stepcredit plan'
weights   how much a token counts in the loss, objective.aggregate

They are read from the parts that an algorithm names: the columns that its credit and loss declare, the estimators that
add these, the growth. docs/algorithms.md has how to add credits up.

Examples
  stepcredit algorithms
  stepcredit algorithms spro prime
  stepcredit algorithms --json"""

FLAGS = {"--json", "--markdown"}
WEIGHTS = {
    "token_mean": "token mean",
    "seq_mean_token_mean": "mean of means",
    "seq_mean_token_sum": "mean of sums",
    "sum_over_constant": "sum / (completions x max length)",
}
HEAD = ("`--algorithm`", "advantage", "loss", "weights", "needs", "forward + backward", "bytes", "source")


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        print(HELP)
        return 0
    flags = FLAGS.intersection(words)
    names, _ = split(
        [word for word in words if word not in FLAGS], dict.fromkeys(["json", "markdown"], ""), "algorithms"
    )
    if flags == FLAGS:
        raise UserError("algorithms: --json and --markdown are two forms of the same; give one")
    from stepcredit.config.algorithms import ALGORITHMS

    for name in names:
        if name not in ALGORITHMS:
            raise UserError(f"algorithms: '{name}' is not known; {did_you_mean(name.lower(), ALGORITHMS)}")
    from stepcredit.plan.algorithms import facts_of

    facts = [facts_of(name) for name in names or ALGORITHMS]
    if "--json" in flags:
        print(json.dumps([as_json(one) for one in facts], indent=1))
    elif "--markdown" in flags:
        print(markdown(facts))
    elif names:
        print("\n\n".join(_shown(one) for one in facts))
    else:
        _print_table(facts)
    return 0


# ---------------------------------------------------------------------- in words


def needs(facts: "AlgorithmFacts") -> list[str]:
    """What it needs beside the policy, groups of completions and answers that can be checked."""
    words = [f"trees of up to {facts.completions} completions"] if facts.branching else []
    words += [f"{model.name}{', learnt' if model.learns else ''}" for model in facts.models]
    if window := facts.config.get("sampler", {}).get("window"):
        words.append(f"windows of {window} tokens")
    if facts.config.get("filter", {}).get("enabled"):
        words.append("prompt filter")
    words += [f"shaper {one if isinstance(one, str) else one['name']}" for one in facts.config.get("shapers", ())]
    return words + ([facts.data] if facts.data else [])


def counted(passes: "Passes") -> str:
    forward = f"{passes.forward - passes.spared}-" if passes.spared else ""
    return f"{forward}{passes.forward} + {passes.backward}"


def weights(facts: "AlgorithmFacts") -> str:
    aggregate = facts.config.get("objective", {}).get("aggregate", "token_mean")
    return WEIGHTS[aggregate] + (" over segments" if facts.branching and aggregate.startswith("seq") else "")


def source(facts: "AlgorithmFacts") -> str:
    return f"arXiv {facts.paper}" if facts.paper[:1].isdigit() else facts.paper


# ---------------------------------------------------------------------- forms


def as_json(facts: "AlgorithmFacts") -> dict[str, Any]:
    """What `--json` gives of one algorithm."""
    same = ("name", "paper", "summary", "advantage", "bytes_per_weight", "branching", "completions", "data", "config")
    return {
        **{name: getattr(facts, name) for name in same},
        "loss": facts.loss_formula,
        "needs": needs(facts),
        "columns": list(facts.columns),
        "models": [{"name": model.name, "learns": model.learns} for model in facts.models],
        "passes": {who: passes._asdict() for who, passes in facts.passes.items()} | {"all": facts.total._asdict()},
    }


def markdown(facts: "Sequence[AlgorithmFacts]") -> str:
    """The table of README.md."""
    rows: list[Sequence[str]] = [HEAD, ["---"] * len(HEAD)]
    for one in facts:
        kl = one.config.get("objective", {}).get("kl", {})
        loss = f"`{one.config['loss']['name']}`" + (f", KL {kl['coef']:g}" if kl.get("coef") else "")
        words = "; ".join(needs(one))
        formula = f"`{one.advantage}`".replace("|", "\\|")
        row = (f"`{one.name}`", formula, loss, weights(one), words, counted(one.total), f"{one.bytes_per_weight:g}")
        rows.append((*row, source(one)))
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


def _print_table(facts: "Sequence[AlgorithmFacts]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("algorithm", "advantage", "needs"):
        table.add_column(column, overflow="fold")
    for column in ("passes", "bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in facts:
        row = (one.name, one.summary, "; ".join(needs(one)), counted(one.total), f"{one.bytes_per_weight:g}")
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print("passes forward + backward over each token, bytes for each weight of the policy: --help says more")


def _shown(facts: "AlgorithmFacts") -> str:
    from stepcredit.config.values import dump_options

    passes = ", ".join(f"{who} {counted(passes)}" for who, passes in facts.passes.items())
    return "\n".join(
        [
            f"{facts.name}: {facts.summary} ({source(facts)})",
            f"  advantage  {facts.advantage}",
            f"  loss       {facts.loss_formula}",
            f"  weights    {weights(facts)}",
            f"  needs      {'; '.join(needs(facts)) or 'nothing beside the policy'}",
            f"  columns    {', '.join(facts.columns) or 'none'}",
            f"  passes     {counted(facts.total)} (forward + backward: {passes})",
            f"  bytes      {facts.bytes_per_weight:g} for each weight of the policy",
            "  config",
            *(f"    {line}" for line in dump_options(facts.config).splitlines()),
        ]
    )
