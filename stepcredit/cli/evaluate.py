"""`stepcredit eval`: what a model gets right, with intervals, records, and a way to go on after a kill."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stepcredit.cli.arguments import output_file, parse
from stepcredit.cli.look import load, looking
from stepcredit.config import Config
from stepcredit.errors import UserError

if TYPE_CHECKING:
    from stepcredit.forest.types import Problem
    from stepcredit.run.evaluate import Evaluation, Sample

log = logging.getLogger("stepcredit")

HELP = """\
usage: stepcredit eval [--model MODEL] [--data DATA[,DATA ...]] [--option value ...]

Accuracy on held-out problems: pass@1 over all samples, unbiased pass@k, majority votes, greedy; with 95% bootstrap
intervals over problems. A solved problem is one that the first reward function gives 1 or more.

  --model MODEL         embedded | folder (a checkpoint of a run, too) | hub id
  --data DATA           embedded | file | folder of a saved data set | hub id | gym:TASK; comma between several
  --num-problems N      all of a file, 600 of the embedded task, 200 of a gym task when not given
  --num-samples N       samples of each problem, 1 when not given
  --temperature X       --max-new-tokens N     --seed N     --eval.greedy false
  --json FILE           write the numbers as JSON, and every completion to FILE.samples.jsonl beside it
  --records FILE        write the completions here instead

With --json or --records an evaluation that is stopped or killed goes on where it was: give the same command again.
Any --task., --sampler., --reward. and --eval. option of 'stepcredit train' works too.

Examples
  stepcredit eval --num-samples 8
  stepcredit eval --model runs/grpo-1/checkpoints/000120 --json result.json
  stepcredit eval --model my-model --data gym:gcd,chain_sum --task.gym.chain_sum.level 2
  stepcredit eval --model my-model --data math500.jsonl,aime.jsonl --num-samples 16 --json result.json"""

JUDGING = ("functions", "options", "kinds", "kind_column", "skip_special_tokens")  # what rewards depend on
ALL = 1_000_000_000  # more problems than a file has


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        print(HELP)
        return 0
    given, own = parse(words, {"json": None, "records": None}, "eval")
    out, records = output_file(own, "json"), output_file(own, "records")
    if out is not None and records is None:
        records = out.with_name(out.name.removesuffix(".json") + ".samples.jsonl")
    from stepcredit.tasks.mixture import is_gym, sources_of

    data = str(given.get("task", {}).get("data", "embedded"))
    sources = _by_name(sources_of(data))
    configs = {name: _config(given, source, endless=is_gym(source)) for name, source in sources.items()}

    from stepcredit.estimators.frozen import fingerprint
    from stepcredit.run.by_source import reported_sources
    from stepcredit.run.evaluate import evaluate

    console, policy, results = Console(), None, {}
    book = Book(records) if records else None
    for name, config in configs.items():
        policy, rollouts = load(config, policy)
        problems = rollouts.task.held_out(config.eval.num_problems)
        known: list[Sample] = []
        if book is not None:
            known = book.begin(name, _settings(config, problems, fingerprint(policy)))
        by_source = reported_sources([], problems, config.track.max_sources)
        total = len(problems) * (config.eval.num_samples + config.eval.greedy)
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task(f"sampling {name}", total=total, completed=len(known))
            rollouts.sampler.on_progress = partial(progress.advance, bar)
            keep = partial(book.write, name) if book is not None else _nothing
            try:
                given_eval, seed = config.eval, config.train.seed
                results[name] = evaluate(
                    rollouts, problems, given_eval.num_samples, given_eval.greedy, seed, known, keep, by_source
                )
            finally:
                rollouts.judge.close()
        title = f"{name}: {len(problems)} problems, {config.eval.num_samples} samples each"
        console.print(title, highlight=False, soft_wrap=True)
    console.print(_table(results))
    if out is not None:
        out.write_text(json.dumps(_numbers(results, configs), indent=1) + "\n", encoding="utf-8")
        console.print(f"numbers in {out}, completions in {records}", highlight=False, soft_wrap=True)
    return 0


def _nothing(samples: "list[Sample]") -> None:
    """Without a file nothing is kept."""


class Book:
    """The completions of evaluations in a file, one a line, behind a line with the settings of each data set.

    A line that was cut short by a kill is dropped; of completions that stand twice, because their batch was done again,
    the later counts.
    """

    def __init__(self, path: Path) -> None:
        from stepcredit.run.evaluate import Sample

        self.path = path
        self.settings: dict[str, Any] = {}
        self.samples: dict[str, dict[tuple[str, int], Sample]] = {}
        whole, dropped = [], 0
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
            try:
                row = json.loads(line)
                name = row.pop("data")
                if "settings" in row:
                    self.settings[name] = row["settings"]
                else:
                    sample = Sample(**row)
                    self.samples.setdefault(name, {})[sample.id, sample.number] = sample
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                dropped += bool(line.strip())
                continue
            whole.append(line + "\n")
        if path.is_file() and not self.settings and path.stat().st_size:
            raise UserError(f"--records: {path} is not a file of an evaluation; name another")
        if dropped:
            log.warning("%s: %d lines cannot be read; what they held is done again", path, dropped)
        beside = path.with_name(f".part-{path.name}")
        beside.write_text("".join(whole), encoding="utf-8")
        beside.replace(path)

    def begin(self, name: str, settings: dict[str, Any]) -> "list[Sample]":
        """The samples that there are of a data set.

        Raises:
            UserError: they are of other settings.
        """
        before = self.settings.get(name)
        if before is None:
            self._append([{"data": name, "settings": settings}])
        elif before != settings:
            changed = [key for key in settings if before.get(key) != settings[key]]
            first = changed[0] if changed else "settings"
            raise UserError(
                f"{self.path} has completions of '{name}' with another {first} ({before.get(first)!r:.60}, now "
                f"{settings.get(first)!r:.60}); remove it or name another with --records"
            )
        found = list(self.samples.get(name, {}).values())
        if found:
            log.warning("going on with %d completions of %s in %s", len(found), name, self.path)
        return found

    def write(self, name: str, samples: "list[Sample]") -> None:
        self._append([{"data": name, **asdict(sample)} for sample in samples])

    def _append(self, rows: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def _settings(config: Config, problems: "list[Problem]", weights: int) -> dict[str, Any]:
    """Everything that the completions and their rewards depend on."""
    asked = json.dumps([(problem.id, problem.question, problem.answer) for problem in problems]).encode()
    return {
        "model": config.model,
        "weights": f"{weights:x}",
        "num_problems": len(problems),
        "problems": hashlib.sha256(asked).hexdigest()[:16],
        "num_samples": config.eval.num_samples,
        "greedy": config.eval.greedy,
        "seed": config.train.seed,
        "sampler": config.sampler.model_dump(mode="json"),
        "prompt": {
            name: getattr(config.task, name)
            for name in ("system_prompt", "prompt_template", "chat_template", "chat_template_kwargs")
        },
        "reward": {name: getattr(config.reward, name) for name in JUDGING},
    }


def _by_name(sources: Sequence[str]) -> dict[str, str]:
    """The data sets by a short name."""
    found: dict[str, str] = {}
    for source in sources:
        name = Path(source).stem
        if name in found:
            raise UserError(f"--data: {found[name]} and {source} have the same name '{name}'; give one of them another")
        found[name] = source
    return found


def _config(given: dict[str, Any], source: str, endless: bool) -> Config:
    """The config for one data set: all of its rows, unless a number is given or a gym task makes them without end."""
    task = given.get("task", {})
    own = {"data": source, "weights": [], "gym": _options_for(source, task.get("gym", {}))}
    given = given | {"task": task | own}
    if source != "embedded" and not endless:
        given["eval"] = {"num_problems": ALL} | given.get("eval", {})
    return looking(given)


def _options_for(source: str, options: Any) -> Any:
    """Of the options of gym tasks those of this one."""
    if not isinstance(options, dict):
        return options
    return {name: value for name, value in options.items() if source == f"gym:{name}"}


def _table(results: "dict[str, Evaluation]") -> Table:
    names = list(dict.fromkeys(name for result in results.values() for name in result.metrics))
    table = Table("", *results)
    for name in names:
        table.add_row(name.removeprefix("eval/"), *(_cell(name, result) for result in results.values()))
    return table


def _cell(name: str, result: "Evaluation") -> str:
    value = result.metrics.get(name)
    if value is None:
        return ""
    kind = name.split("/")[1]  # the source behind it left out
    if kind in ("length", "reward"):
        return f"{value:.1f}" if kind == "length" else f"{value:.3f}"
    low, high = result.intervals.get(name, (None, None))
    return f"{value:.1%}" if low is None else f"{value:.1%}  ({low:.1%} to {high:.1%})"


def _numbers(results: "dict[str, Evaluation]", configs: dict[str, Config]) -> dict[str, Any]:
    """Metrics by name, means over the data sets where there are several; and all of each data set."""
    names = dict.fromkeys(name for result in results.values() for name in result.metrics)
    means = {}
    for name in names:
        values = [result.metrics[name] for result in results.values() if name in result.metrics]
        means[name] = sum(values) / len(values)
    each = {
        name: {
            "num_problems": len({sample.id for sample in result.samples}),
            "num_samples": configs[name].eval.num_samples,
            **result.metrics,
            "intervals": result.intervals,
        }
        for name, result in results.items()
    }
    return {**means, "model": next(iter(configs.values())).model, "data": each}
