"""`stepcredit audit`: credit functions against what steps are worth by rollouts."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from stepcredit.cli.arguments import output_file, parse
from stepcredit.cli.audit_tables import gradient_table, numbers_of, table
from stepcredit.config import Config, CreditConfig, merge, read_yaml, resolve
from stepcredit.config.algorithms import ALGORITHMS
from stepcredit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from stepcredit.forest import Forest
    from stepcredit.forest.types import Tree
    from stepcredit.growth.prefix_values import Count, Plan, Returns
    from stepcredit.policy.forward import Policy
    from stepcredit.report.audit import Book
    from stepcredit.verifiers.judging import Judge

log = logging.getLogger("stepcredit")

HELP = """\
usage: stepcredit audit RUN_OR_ROLLOUTS --model MODEL [--credits A,B,...] [--num-rollouts K] [--option value ...]

Asks of each credit function whether it tells the steps that help from those that harm. From the start of every step of
saved completions, right and wrong ones, MODEL goes on K times; the change of the mean reward in a step is what the step
is worth. docs/audit.md says what each number means.

  RUN_OR_ROLLOUTS       folder of a run (--iteration N, the last saved one if not given), or a file of saved rollouts
  --model MODEL         that continues the completions: the one that sampled them, or a prover (embedded | folder | hub
                        id)
  --credits A,B,...     names or dotted paths; all but vine, which has the same rollouts, when not given
  --num-rollouts K      of each prefix, 16 when not given
  --num-completions N   64 when not given
  --ref MODEL           the reference, where the rollouts have no ref_logprobs; the model that a run began with if not
                        given
  --prm MODEL           a process reward model, where they have no prm_logprobs (checkpoints/N/prm of a run of prime)
  --out FILE            keep what is measured: rollouts with the values of their steps, which 'stepcredit credit
                        --credit.name vine' reads; an audit that was stopped or killed goes on with it
  --json FILE           write the numbers; what is measured goes to FILE.rollouts.jsonl if there is no --out
  --gradients false     without the policy gradients, which take a backward pass of each completion for each credit
  --data FILE           where the verifier needs columns of the problems that rollouts do not have

Any --prefix-values., --sampler., --reward. and --task. option of 'stepcredit train' works too; those of a run are its
own when not given.

Examples
  stepcredit audit runs/grpo-1 --model runs/grpo-1/checkpoints/000120
  stepcredit audit rollouts.jsonl --model my-model --ref my-base --credits grpo,spro --num-rollouts 32 --json audit.json
  stepcredit audit rollouts.jsonl --model my-model --prefix-values.step.tokens 50"""

OWN = {"credits": None, "iteration": None, "num-rollouts": None, "num-completions": "64", "ref": None, "prm": None}
OWN |= {"out": None, "json": None, "gradients": "true"}
ROLLOUTS = 16
OTHER_POLICY = 0.02  # nats a token, more than rounding to bf16 makes
NEEDS = {
    "ref_logprobs": "ref_logprobs, which these rollouts do not have: name the reference with --ref",
    "prm_logprobs": "prm_logprobs, which these rollouts do not have: name the process reward model with --prm",
}


def main(words: Sequence[str]) -> int:
    if not words or "--help" in words or "-h" in words:
        print(HELP)
        return 0
    if words[0].startswith("--"):
        raise UserError("audit: name a run or a file of rollouts first; see 'stepcredit audit --help'")
    given, own = parse(words[1:], OWN, "audit")
    if "model" not in given:
        raise UserError("audit: name the model that goes on from the completions with --model, such as a checkpoint")
    file, saved = _source(words[0], own)
    has_data = "data" in given.get("task", {})
    out, numbers = output_file(own), output_file(own, "json")
    if numbers is not None and out is None:
        out = numbers.with_name(numbers.name.removesuffix(".json") + ".rollouts.jsonl")
    rollouts = {"num_rollouts": _whole(own, "num-rollouts")} if "num-rollouts" in own else {}
    own_values = {"num_rollouts": ROLLOUTS} | given.get("prefix_values", {}) | rollouts
    of_run = {name: value for name, value in saved.get("prefix_values", {}).items() if name not in OWN_OF_RUNS}
    config = resolve(merge(saved, given) | {"prefix_values": of_run | own_values})
    _check(config)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return _audit(str(file), config, saved, own, has_data, out, numbers)


OWN_OF_RUNS = ("model", "start", "eta")  # of prefix_values: a run's own, which an audit does not take over


def _check(config: Config) -> None:
    if config.prefix_values.eta:
        raise UserError("prefix_values.eta: an audit compares with mean returns; leave it out")
    if config.prefix_values.model is not None:
        raise UserError("prefix_values.model: give the model that goes on as --model")
    if config.prefix_values.start != "rollouts":
        raise UserError("prefix_values.start: an audit takes rollouts of the prompt, too")


def _whole(own: Mapping[str, str], name: str) -> int:
    if not own[name].isdigit() or int(own[name]) < 1:
        raise UserError(f"--{name}: '{own[name]}' is not a whole number from 1 on")
    return int(own[name])


def _truth_of(name: str, word: str) -> bool:
    if word not in ("true", "false"):
        raise UserError(f"--{name}: '{word}' is neither true nor false")
    return word == "true"


def _source(source: str, own: Mapping[str, str]) -> tuple[Path, dict[str, Any]]:
    """The file of rollouts, and the config of the run that wrote it, if it is known."""
    path = Path(source)
    if not path.is_dir():
        if "iteration" in own:
            raise UserError("--iteration: belongs to a run; a file of rollouts is read whole")
        config = path.parent.parent / "config.yaml"
        return path, _saved(config) if path.parent.name == "rollouts" and config.is_file() else {}
    from stepcredit.display.runs import read_runs

    runs = read_runs([source])
    if len(runs) > 1:
        raise UserError(f"'{source}' holds {len(runs)} runs; name one of them")
    files = runs[0].files
    if not files:
        raise UserError(f"'{source}' has no saved rollouts (rollouts.every, rollouts.max_trees)")
    iteration = _whole(own, "iteration") if "iteration" in own else max(files)
    if iteration not in files:
        raise UserError(f"--iteration: {iteration} was not saved; there are {', '.join(map(str, sorted(files)))}")
    return files[iteration], _saved(path / "config.yaml")


def _saved(config: Path) -> dict[str, Any]:
    return read_yaml(str(config)) if config.is_file() else {}


def _audit(
    file: str,
    config: Config,
    saved: Mapping[str, Any],
    own: Mapping[str, str],
    has_data: bool,
    out: Path | None,
    numbers: Path | None,
) -> int:
    from stepcredit.forest import Forest
    from stepcredit.forest.records import read_trees
    from stepcredit.growth.prefix_values import plan, steps_of
    from stepcredit.growth.steps import step_rule
    from stepcredit.policy.loading import load_policy
    from stepcredit.report.agreement import agreement, noise_ceiling, sizes
    from stepcredit.report.audit import Book, Measured, check_trees, choose, gradient_fits
    from stepcredit.report.credits import unfold

    trees = list(read_trees(file))
    if not trees:
        raise UserError(f"{file}: there are no rollouts")
    judge, delimiters = _judge(file, trees, config, saved, has_data)
    policy = load_policy(config.model, config.train.device, config.train.dtype, config.trust_remote_code)
    judge.tokenizer = policy.tokenizer
    check_trees(file, trees, policy)
    forest = Forest.from_trees(trees)
    flat, source = unfold(forest)
    with closing(judge):
        judged = judge(flat.without_token("token_rewards"))  # as rollouts are: without shapers, penalties of the run
    given = config.prefix_values
    rule = step_rule(given.step.tokens, given.step.delimiters, policy.tokenizer, delimiters, "prefix_values.step")
    steps = steps_of(judged, rule, given.max_steps)
    chosen = choose(steps, _whole(own, "num-completions"))
    if not chosen:
        raise UserError(
            f"{file}: none of {len(steps)} judged completions has two steps; cut them otherwise with "
            "--prefix-values.step.delimiters or --prefix-values.step.tokens"
        )
    made = plan(chosen, given.num_rollouts, given.max_tokens)
    scored, is_policy = _with_columns(forest, policy, config, saved, own)
    scores, refused = _scores(scored, _names(own), config, saved)
    with_gradients = _truth_of("gradients", own["gradients"]) and is_policy
    settings = _settings(trees, policy, config, judge, made)
    console = Console()
    returns, count = _returns(console, policy, judge, config, judged, made, Book(out, settings))
    measured = Measured.of(judged, made.steps, returns)
    if not measured.steps:
        raise UserError(f"{file}: the rollouts of no completion have rewards; look at the reward functions")
    found = {name: agreement(measured.values, measured.by_step(score[source])) for name, score in scores.items()}
    ceiling, counted = noise_ceiling(measured.values), sizes(measured.values)
    right = sum(each.total >= 1 for each in measured.steps)
    one_step = sum(len(each.starts) == 1 for each in steps)
    _print_plain(
        console,
        f"{file}: {counted.completions} completions ({right} right) of {counted.steps} steps, {made.num_rollouts} "
        f"rollouts of each prefix",
        f"sampled now: {count.sampled:,} tokens, and {count.encoded:,} of prefixes computed",
        f"left out: {one_step} completions of one step" if one_step else "",
        f"left out: {len(chosen) - counted.completions} completions whose rollouts have no reward"
        if len(chosen) > counted.completions
        else "",
    )
    values = {name: score[source] for name, score in scores.items()}
    fits = gradient_fits(policy, flat, measured, values, config) if with_gradients else {}
    console.print(table(found, ceiling, counted))
    if fits:
        console.print(gradient_table(fits))
    _print_plain(console, *(f"{name}: {why}" for name, why in refused.items()))
    if numbers is not None:
        number_of = asdict(counted) | {"right": right, "one_step": one_step}
        written = numbers_of(settings, made, asdict(count), number_of, found, ceiling, fits, refused, measured)
        numbers.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    _print_plain(console, f"numbers in {numbers}" if numbers else "", f"rollouts with values in {out}" if out else "")
    return 0


def _print_plain(console: Console, *lines: str) -> None:
    for line in lines:
        if line:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _settings(
    trees: "Sequence[Tree]", policy: "Policy", config: Config, judge: "Judge", made: "Plan"
) -> dict[str, Any]:
    """Everything that the values depend on."""
    from stepcredit.estimators.frozen import fingerprint
    from stepcredit.tasks.base import canonical

    tokens = json.dumps([[tree.prompt_ids, [segment.token_ids for segment in tree.segments]] for tree in trees])
    return {
        "model": config.model,
        "weights": f"{fingerprint(policy, adapters=True):x}",
        "dtype": config.train.dtype,
        "rollouts": hashlib.sha256(tokens.encode()).hexdigest()[:16],
        "steps": [[each.leaf, *each.starts] for each in made.steps],
        "seed": config.train.seed,
        "sampler": config.sampler.model_dump(mode="json"),
        "prefix_values": config.prefix_values.model_dump(mode="json"),
        "rewards": {name: weight for name, weight in zip(judge.rewards, judge.weights, strict=True)},
        "reward": config.reward.model_dump(mode="json", exclude={"functions", "weights", "workers"}),
        "answers": hashlib.sha256(b"".join(canonical(tree.problem) for tree in trees)).hexdigest()[:16],
    }


def _returns(
    console: Console, policy: "Policy", judge: "Judge", config: Config, flat: "Forest", made: "Plan", book: "Book"
) -> "tuple[Returns, Count]":
    """Sample and judge what the book does not have."""
    from stepcredit.growth.prefix_values import Rollouts
    from stepcredit.learn.placement import UNSHARDED
    from stepcredit.report.audit import measure_all
    from stepcredit.samplers.table import build_sampler

    sampler = build_sampler(config, policy, UNSHARDED)
    rollouts = Rollouts(sampler, config.sampler, judge, config.train.seed)
    try:
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("completions", total=len(made.steps))
            advance, forget = partial(progress.advance, bar), partial(sampler.sync, policy)
            return measure_all(rollouts, flat, made, config.prefix_values, book, advance, forget), rollouts.count
    finally:
        judge.close()
        sampler.close()


# ---------------------------------------------------------------------- what judges


def _judge(
    file: str, trees: "list[Tree]", config: Config, saved: Mapping[str, Any], has_data: bool
) -> "tuple[Judge, Sequence[str]]":
    """What judges the rollouts, and what ends a step of the task."""
    from stepcredit.cli.score import with_data
    from stepcredit.demo.task import EmbeddedTask
    from stepcredit.tasks.base import Task
    from stepcredit.tasks.mixture import rows_of
    from stepcredit.tasks.rewards import build_judge, check_rows, function_names, named_rewards

    names = function_names(config) or list(dict.fromkeys(n for t in trees for s in t.segments for n in s.rewards))
    if not names:
        raise UserError(f"{file}: the rollouts do not name a reward function; give one with --reward.functions")
    embedded = config.task.data == "embedded" if saved or has_data else names == list(EmbeddedTask.reward_functions)
    if config.task.data != "embedded":
        with_data(trees, rows_of(config, [tree.problem.id for tree in trees]), file, config.task.data)
    rewards = named_rewards(config, names)
    check_rows(rewards, [tree.problem for tree in trees], file)
    weights = config.reward.weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise UserError(
            f"reward.weights: {len(weights)} weights for {len(names)} reward functions ({', '.join(names)}); name the "
            "functions of the run with --reward.functions"
        )
    delimiters = EmbeddedTask.step_delimiters if embedded else Task.step_delimiters
    return build_judge(config, rewards, weights, None), delimiters


# ---------------------------------------------------------------------- the credits


def _names(own: Mapping[str, str]) -> list[str]:
    from stepcredit.credit import CREDIT
    from stepcredit.imports import by_name

    names = [name.strip() for name in own.get("credits", "").split(",") if name.strip()]
    for name in names:
        by_name("--credits", name, CREDIT)
    return names or [name for name in CREDIT if name != "vine"]


def _with_columns(
    forest: "Forest", policy: "Policy", config: Config, saved: Mapping[str, Any], own: Mapping[str, str]
) -> "tuple[Forest, bool]":
    """The rollouts with the log-probabilities that they lack and a model gives; and whether --model sampled them."""
    from stepcredit.policy.forward import score
    from stepcredit.policy.loading import load_policy

    models = {"ref": own.get("ref", saved.get("model")), "prm": own.get("prm")}
    temperature, most = config.sampler.temperature or 1.0, config.optim.max_tokens_per_micro_batch
    own_scores = score(policy, forest, temperature, most).logprobs
    sampled_with = forest.token.get("old_logprobs", forest.token.get("rollout_logprobs"))
    gap = math.inf
    if sampled_with is None:
        log.warning(
            "the rollouts have no log-probabilities, so that it is not known whether --model sampled them; no gradients"
        )
    else:
        gap = float((sampled_with - own_scores).abs()[forest.token_sampled].mean())
        if gap > OTHER_POLICY:
            log.warning(
                "--model is not the policy that sampled these rollouts: their log-probabilities differ by %.2g nats a "
                "token; values are those of --model, a prover, and there are no gradients",
                gap,
            )
    columns = {} if "old_logprobs" in forest.token else {"old_logprobs": own_scores}
    vocabulary = policy.tokenizer.get_vocab()
    for name, model in models.items():
        column = f"{name}_logprobs"
        if column in forest.token or model is None:
            continue
        scorer = load_policy(
            model, config.train.device, config.train.dtype, config.trust_remote_code, option=f"--{name}"
        )
        if scorer.tokenizer.get_vocab() != vocabulary:
            raise UserError(f"--{name}: '{model}' has another vocabulary than --model")
        columns[column] = score(scorer, forest, 1.0 if name == "prm" else temperature, most).logprobs
    return forest.with_token(**columns), gap <= OTHER_POLICY


def _scores(
    forest: "Forest", names: Sequence[str], config: Config, saved: Mapping[str, Any]
) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """[num_tokens] advantages by credit function; and why others are refused."""
    from stepcredit.credit import CREDIT, needs_of
    from stepcredit.imports import by_name
    from stepcredit.report.credits import score_tokens

    scores: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    for name in names:
        needs = needs_of(by_name("--credits", name, CREDIT))
        missing = [column for column in needs.columns if not forest.has(column)]
        if name == "vine":
            refused[name] = "is what the others are compared with; the noise ceiling says how well it knows itself"
        elif missing:
            refused[name] = f"needs {NEEDS.get(missing[0], f'{missing[0]}, which these rollouts do not have')}"
        else:
            try:
                scores[name] = score_tokens(forest, _credit(name, config, saved))
            except UserError as error:
                refused[name] = str(error)
    if not scores:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise UserError(f"--credits: there is none to look at ({reasons})")
    return scores, refused


def _credit(name: str, config: Config, saved: Mapping[str, Any]) -> CreditConfig:
    """The run's own options for its credit function, an algorithm's defaults for another one."""
    if config.credit.sum is None and name == config.credit.name:
        return config.credit
    if name in ALGORITHMS:
        return resolve({"algorithm": name, "model": saved.get("model", config.model)}).credit
    return CreditConfig(name=name)
