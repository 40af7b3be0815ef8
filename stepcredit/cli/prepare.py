"""`stepcredit prepare`: what an algorithm needs from the reference before training, made once for many runs."""

import logging
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from stepcredit.cli.arguments import output_file, parse
from stepcredit.config import Config, merge, resolve
from stepcredit.errors import UserError, did_you_mean
from stepcredit.imports import search_in

if TYPE_CHECKING:
    from stepcredit.estimators.prepared import Prepared
    from stepcredit.forest.types import Problem
    from stepcredit.tasks.base import Task

HELP = """\
usage: stepcredit prepare [CONFIG.yaml] --out FILE [--what value] [--num-samples N] [--option value ...]

Samples completions of each training problem from a reference model, judges them and writes their rewards: with
'stepcredit train --algorithm astar_po --prepare.file FILE' a run takes the values of its prompts from there. Give the
options that the run will have: another model, sampler, reward or prompt is refused there, with what differs.

  --out FILE            JSON lines, one a problem. The same command goes on where one was stopped or killed
  --what NAME           value, which is all there is
  --num-samples N       completions of each problem, 8 when not given (of a run: --prepare.num-samples)
  --num-problems N      the first training problems of --seed; all rows of a file when not given
  --model MODEL         the reference: embedded | folder | hub id
  --data DATA           embedded | file | hub id | gym:TASK; comma between several
  --temperature X       --max-new-tokens N     --seed N     --device NAME

Any --task., --sampler., --reward. and --prepare. option of 'stepcredit train' works too.

Examples
  stepcredit prepare --model my-model --data problems.jsonl --num-samples 8 --out values.jsonl
  stepcredit train --algorithm astar_po --model my-model --data problems.jsonl --prepare.file values.jsonl
  torchrun --nproc-per-node 8 -m stepcredit prepare run.yaml --out values.jsonl"""

WHAT = ("value",)


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        print(HELP)
        return 0
    own = {"config": None, "what": WHAT[0], "out": None, "num-samples": None, "num-problems": None}
    given, options = parse(words, own, "prepare")
    if options["what"] not in WHAT:
        raise UserError(f"--what: '{options['what']}' is not known; {did_you_mean(options['what'], WHAT)}")
    out = output_file(options)
    if out is None:
        raise UserError("--out FILE is missing; see 'stepcredit prepare --help'")
    if "num-samples" in options:
        given = merge(given, {"prepare": {"num_samples": _count(options, "num-samples")}})
    config = resolve(merge({"distributed": {"strategy": "ddp"}}, given))
    config.prepare.check()
    for option, ignored in (("file", config.prepare.file is not None), ("value zero", not config.prepare.samples)):
        if ignored:
            raise UserError(
                f"prepare.{option}: nothing would be sampled; it is an option of the run. Leave it out here"
            )
    count = _count(options, "num-problems") if "num-problems" in options else None

    from rich.console import Console

    from stepcredit.estimators.frozen import fingerprint
    from stepcredit.estimators.prepared import header_of, make_prepared
    from stepcredit.learn.loading import adapt, load_model
    from stepcredit.processes.ranks import Ranks
    from stepcredit.run.build import build_parts, build_placement, build_rollouts
    from stepcredit.run.checks import check_gold
    from stepcredit.run.preparing import PreparationBar

    ranks = Ranks.join(config.distributed.timeout_s, config.train.device)
    logging.basicConfig(level=logging.INFO if ranks.main else logging.ERROR, format="%(message)s")
    console = Console(quiet=not ranks.main)
    search_in(*config.code_folders)
    if config.sampler.temperature == 0:
        raise UserError("sampler.temperature: a value is a mean over samples, so a temperature above 0")
    parts, placement = build_parts(config), build_placement(config, ranks)
    if placement.sharded or config.distributed.strategy == "fsdp":
        raise UserError("distributed.strategy fsdp: prepare samples with a whole model in each process; take ddp")
    policy = load_model(config, config.model, placement)
    adapt(config, policy)  # as a run does: adapters hold the weights in the type that it computes with
    rollouts = build_rollouts(config, parts, policy, placement)
    with closing(rollouts.sampler), closing(rollouts.judge):
        check_gold(rollouts.judge, rollouts.task, config.reward)
        problems = _problems(rollouts.task, count)
        header = header_of(config, rollouts, fingerprint(policy.model))
        with PreparationBar(console) as bar:
            made = make_prepared(out, header, rollouts, problems, bar)
    for line in _summary(made, config):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"everything is in {out}", highlight=False, soft_wrap=True)
    ranks.leave()
    return 0


def _count(options: dict[str, str], name: str) -> int:
    if not options[name].isdigit() or int(options[name]) < 1:
        raise UserError(f"--{name} must be a whole number of at least 1, got '{options[name]}'")
    return int(options[name])


def _problems(task: "Task", count: int | None) -> "list[Problem]":
    if count is not None:
        return list({problem.id: problem for problem in task.draw(0, count)}.values())
    if task.endless:
        raise UserError(
            f"{task.name} makes problems without end; say with --num-problems how many a run draws (train.iterations x "
            "train.problems_per_iteration), and give its --seed"
        )
    return task.rows()


def _summary(made: "Prepared", config: Config) -> list[str]:
    from stepcredit.estimators.prompt_value import all_wrong, judged, value_of

    rows = [row for row in made.rows if judged(row)]
    samples = [reward for row in made.rows for reward in row.rewards]
    rewards = [reward for reward in samples if reward is not None]
    lines = [f"{len(made.rows)} problems, {len(samples)} completions, {made.tokens:,} tokens sampled"]
    if rows:
        values = [value_of(row, config.prepare) for row in rows]
        wrong = sum(map(all_wrong, rows))
        lines.append(
            f"mean reward {sum(rewards) / len(rewards):.3f}, mean value ({config.prepare.value}) "
            f"{sum(values) / len(values):.3f}; {wrong} problems without a rewarded sample"
        )
    if len(rewards) < len(samples):
        lines.append(
            f"{len(samples) - len(rewards)} completions were not judged and are in no value; "
            f"{len(made.rows) - len(rows)} problems have none that was, and so no value"
        )
    return lines
