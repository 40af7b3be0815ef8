"""`stepcredit sample`: look at what a model does."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from stepcredit.cli.arguments import output_file, parse
from stepcredit.config import Config, resolve
from stepcredit.config.algorithms import algorithm
from stepcredit.errors import UserError

if TYPE_CHECKING:
    from stepcredit.growth.rollouts import Rollouts
    from stepcredit.policy.forward import Policy

SAMPLE_HELP = """\
usage: stepcredit sample [--model MODEL] [--data DATA | --prompt TEXT] [--option value ...]

Prints completions with their rewards.

  --model MODEL         embedded | folder | hub id
  --data DATA           embedded | file | hub id; held-out problems are shown
  --prompt TEXT         a question of your own instead (no rewards)
  --num-problems N      3 by default         --group-size N   completions of each, 4 by default
  --temperature X       --max-new-tokens N   --seed N
  --out FILE            also write the rollouts as records (.jsonl or .jsonl.zst)

Examples
  stepcredit sample --num-problems 1 --group-size 8
  stepcredit sample --model runs/grpo-1/checkpoints/000120 --temperature 0 --group-size 1
  stepcredit sample --algorithm treerpo --growth.num-branches 2 --num-problems 1
  stepcredit sample --prompt "Ivy = 14 . Mia = Ivy - 1 . Mia ?" """


def sample(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        print(SAMPLE_HELP)
        return 0
    given, own = parse(words, {"prompt": None, "out": None}, "sample")
    branching = algorithm(str(given.get("algorithm", "grpo"))).growth
    given = {"eval": {"num_problems": 3}, "growth": {} if branching else {"group_size": 4}} | given
    config, out = looking(given), output_file(own)
    from stepcredit.forest.records import write_trees
    from stepcredit.forest.types import Problem
    from stepcredit.seeds import EVALUATION, sampling_seed

    console, (policy, rollouts) = Console(), load(config)
    if "prompt" in own:
        problems = [Problem(own["prompt"], id="prompt")]
    else:
        problems = rollouts.task.held_out(config.eval.num_problems)
    seeds = [sampling_seed(config.train.seed, EVALUATION, number) for number in range(len(problems))]
    forest = rollouts.grow(rollouts.sampler, problems, rollouts.encode, rollouts.params, seeds)
    if "prompt" not in own:
        forest = rollouts.judge(forest)
    trees = forest.to_trees()
    ids = [list(segment.token_ids) for tree in trees for segment in tree.segments]
    texts = [str(text) for text in policy.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    shown = iter(texts)
    for tree in trees:
        console.rule(f"problem {tree.problem.id}", align="left")
        console.print(str(tree.problem.question), markup=False, highlight=False, soft_wrap=True, style="bold")
        if tree.problem.answer is not None:
            console.print(f"answer: {tree.problem.answer}", markup=False, highlight=False, soft_wrap=True)
        depth: list[int] = []
        for segment in tree.segments:
            depth.append(0 if segment.parent < 0 else depth[segment.parent] + 1)
            mark = "     " if segment.reward is None else f"{segment.reward:4.2f} "
            end = " [truncated]" if segment.finish == "length" else ""
            text = "    " * depth[-1] + next(shown)
            console.print(f"{mark}{text}{end}", markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        write_trees(out, forest, texts=texts)
    return 0


def looking(given: dict[str, Any]) -> Config:
    """The config of a command that only looks: every row of a data file is held out."""
    given = given | {"task": dict(given.get("task") or {})}
    task = given["task"]
    if task.get("data", "embedded") != "embedded":
        task.setdefault("eval_data", task["data"])
        task.setdefault("eval_split", task.get("split", "train"))
    config = resolve(given)
    if config.eval.num_problems == 0:
        raise UserError("eval.num_problems: at least one problem is needed, give --num-problems 1 or more")
    return config


def load(config: Config, policy: "Policy | None" = None) -> "tuple[Policy, Rollouts]":
    """The model, unless it is loaded already, and what sampling and judging take."""
    from stepcredit.policy.loading import load_policy
    from stepcredit.run.build import build_parts, build_rollouts

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parts = build_parts(config)
    if policy is None:
        policy = load_policy(config.model, config.train.device, config.train.dtype, config.trust_remote_code)
    return policy, build_rollouts(config, parts, policy)
