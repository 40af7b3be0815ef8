"""`stepcredit score`: is the verifier right? Grades gold answers, a column of a file, or saved rollouts."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from stepcredit.cli.arguments import output_file, parse
from stepcredit.config import Config, resolve
from stepcredit.errors import UserError

if TYPE_CHECKING:
    from stepcredit.forest.types import Problem, Tree
    from stepcredit.verifiers.judging import Judge

HELP = """\
usage: stepcredit score --data FILE --gold [--verifier NAME] [--json OUT]
       stepcredit score --data FILE --completion-column COLUMN [--verifier NAME] [--json OUT]
       stepcredit score --in ROLLOUTS [--data FILE] [--verifier NAME] [--out ROLLOUTS] [--json OUT]
       stepcredit score --in ROLLOUTS --prm MODEL --ref MODEL --out ROLLOUTS [--beta X]

Grades answers without a model, to see whether a verifier can be trusted before a run depends on it.

  --data FILE           file (.jsonl .json .csv .tsv .parquet), several or a * | folder of a saved data set | hub id |
                        gym:TASK, of which --num-problems are graded
  --gold                grade each row's own answer, which must be accepted
  --completion-column C grade this column of the data instead
  --in ROLLOUTS         grade the completions of saved rollouts (.jsonl or .jsonl.zst; TRL's and verl's, too) anew;
                        --data gives the verifier the columns of their problems, found by id (or question)
  --out ROLLOUTS        with --in: write them with the new rewards
  --prm MODEL, --ref MODEL   a process reward model, such as checkpoints/N/prm of a run with --algorithm prime, and the
                        model that it began as; --out gets token_rewards, X x (log pi_prm - log pi_ref), X 0.05 if not
                        given
  --verifier NAME       math | code | exact | chain | ... or a dotted path; the data's own when not given
  --json OUT            write {"accepted", "total", "failed": [{"id", "reason", ...}]}

Any --task. and --reward. option of 'stepcredit train' works too. Accepted is what gets a reward of 1 or more. With
--gold the exit code is 1 when a run would refuse to start: under --reward.gold-threshold, 0.9.

Examples
  stepcredit score --data math500.jsonl --gold
  stepcredit score --data mbpp.jsonl --gold --verifier code --json gold.json
  stepcredit score --data gym:chain_sum,gcd --gold
  stepcredit score --data answers.csv --completion-column output --verifier math
  stepcredit score --in runs/grpo-1/rollouts/000010.jsonl.zst --verifier chain
  stepcredit score --in rollouts.jsonl --prm runs/prime-1/checkpoints/000120/prm --ref embedded --out rewarded.jsonl"""

log = logging.getLogger("stepcredit")

SHOWN = 10  # failures on the screen
OWN = {"gold": "false", "completion-column": None, "in": None, "out": None, "verifier": None, "json": None}
OWN |= {"prm": None, "ref": None, "beta": "0.05"}


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        print(HELP)
        return 0
    given, own = parse(words, OWN, "score")
    if "verifier" in own:
        given = given | {"reward": given.get("reward", {}) | {"functions": [own["verifier"]]}}
    has_data = "data" in given.get("task", {})
    if own["gold"] not in ("true", "false"):
        raise UserError(f"--gold: true or false, not '{own['gold']}'")
    if (own["gold"] == "true") + ("completion-column" in own) + ("in" in own) != 1:
        raise UserError("score: give one of --gold, --completion-column COLUMN and --in ROLLOUTS; see --help")
    if "in" not in own and not has_data:
        raise UserError("score: name the rows to grade with --data FILE")
    if "prm" in own or "ref" in own:
        from stepcredit.cli.prm import score_prm

        out = output_file(own)
        if not {"prm", "ref", "in"} <= own.keys() or out is None:
            raise UserError(
                "score: a process reward model takes --in ROLLOUTS, --prm MODEL, --ref MODEL and --out FILE"
            )
        graded = [name for name in ("data", "verifier", "json") if name in own or name in given.get("task", {})]
        if graded:
            raise UserError(
                f"score: a process reward model grades nothing, so --prm does not go with --{', --'.join(graded)}"
            )
        return score_prm(resolve(given), own, out)
    if "out" in own and "in" not in own:
        raise UserError("--out: belongs to --in; the numbers go to --json FILE")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config, out = resolve(given), output_file(own, "json")
    if "in" in own:
        return _rescore(config, own["in"], has_data, output_file(own), out)

    judge, problems = _prepared(config)
    try:
        if own["gold"] == "true":
            failed, total = _gold(judge, problems), len(problems)
        else:
            failed, total = _column(judge, problems, own["completion-column"]), len(problems)
    finally:
        judge.close()
    share = _report(config.task.data, failed, total, out)
    return 1 if own["gold"] == "true" and share < config.reward.gold_threshold else 0


def _prepared(config: Config) -> "tuple[Judge, list[Problem]]":
    from stepcredit.tasks.dataset import DatasetTask
    from stepcredit.tasks.mixture import rows_of
    from stepcredit.tasks.rewards import build_judge, build_rewards

    problems = rows_of(config)
    rewards, weights = build_rewards(config, DatasetTask(config.task.data, problems, problems, 0))
    return build_judge(config, rewards, weights, None), problems


def _gold(judge: "Judge", problems: "list[Problem]") -> list[dict[str, Any]]:
    checked = judge.check_gold(problems)
    if not checked:
        raise UserError(
            f"--gold: '{', '.join(judge.rewards)}' does not say what a gold answer looks like; give the function an "
            "attribute `gold`, a function from a Problem to the completion that is right, or grade a column with "
            "--completion-column"
        )
    failed = {"": judge.unfit(problems)}
    for name, check in checked.items():
        failed[name] = [*((problem, "there is no gold answer") for problem in check.missing), *check.failed]
    return [
        {"id": problem.id, "verifier": name, "answer": problem.answer, "reason": why}
        for name, found in failed.items()
        for problem, why in found
    ]


def _column(judge: "Judge", problems: "list[Problem]", column: str) -> list[dict[str, Any]]:
    from stepcredit.errors import did_you_mean
    from stepcredit.verifiers.judging import fitting, is_right, outcome_reward

    names = {name for problem in problems for name in problem.columns}
    if column not in names:
        raise UserError(f"--completion-column: no column '{column}'; {did_you_mean(column, names)}")
    texts = [problem.columns.get(column) for problem in problems]
    for problem, text in zip(problems, texts, strict=True):
        if not isinstance(text, str):
            raise UserError(f"problem '{problem.id}': column '{column}' must be text, found {text!r:.40}")
    failed = {}
    found = judge.judge(problems, [str(text) for text in texts])
    for row, problem in enumerate(problems):
        for name, outcome in fitting({name: column[row] for name, column in found.items()}).items():
            if not is_right(outcome) and problem.id not in failed:
                reward = outcome_reward(outcome)
                reason = outcome.message or f"it gets {'no reward' if reward is None else f'{reward:g}'}"
                failed[problem.id] = {
                    "id": problem.id,
                    "verifier": name,
                    "answer": problem.answer,
                    "reward": reward,
                    "reason": reason,
                }
    return list(failed.values())


def _report(source: str, failed: list[dict[str, Any]], total: int, out: Path | None) -> float:
    """Print and write what was found; the share that was accepted."""
    accepted = total - len({row["id"] for row in failed})
    console = Console()
    console.print(f"{source}: {accepted} of {total} accepted ({accepted / total:.1%})", highlight=False, soft_wrap=True)
    for row in failed[:SHOWN]:
        console.print(f"  {row['id']}: {row['reason']}", markup=False, highlight=False, soft_wrap=True)
    if len(failed) > SHOWN:
        console.print(f"  and {len(failed) - SHOWN} more{'' if out else '; see all with --json FILE'}")
    if out is not None:
        text = json.dumps({"accepted": accepted, "total": total, "failed": failed}, indent=1, ensure_ascii=False)
        out.write_text(text + "\n", encoding="utf-8")
    return accepted / total


# ---------------------------------------------------------------------- saved rollouts


def _rescore(config: Config, source: str, has_data: bool, rollouts_out: Path | None, out: Path | None) -> int:
    from stepcredit.forest import Forest
    from stepcredit.forest.records import write_trees
    from stepcredit.tasks.mixture import rows_of
    from stepcredit.tasks.rewards import build_judge, check_rows, function_names, named_rewards
    from stepcredit.tasks.rollouts import read_rollouts
    from stepcredit.verifiers.judging import Asked, fitting, is_right, outcome_reward

    trees, form = read_rollouts(source, None, config.task.columns)
    if has_data:
        with_data(trees, rows_of(config, [tree.problem.id for tree in trees]), source, config.task.data)
    saved = sorted({n for tree in trees for s in tree.segments for n in s.rewards}) if form == "stepcredit" else []
    names = function_names(config) or saved
    if not names:
        raise UserError(f"{source}: the rollouts do not name a reward function; give one with --verifier")
    rewards = named_rewards(config, names)
    for name, reward in rewards.items():
        if form == "stepcredit" and not (reward.skip_special_tokens and config.reward.skip_special_tokens):
            log.warning("'%s' is to see special tokens, and saved texts are without them", name)
    check_rows(rewards, [tree.problem for tree in trees], source)
    judge = build_judge(config, rewards, config.reward.weights or [1.0] * len(names), None)
    leaves = [(tree, leaf) for tree in trees for leaf in _leaves(tree)]
    texts = [_text(tree, leaf, source) for tree, leaf in leaves]
    ends = [str(tree.extra.get("prompt_end", "")) for tree, _ in leaves]
    try:
        found = judge.judge_asked(Asked([tree.problem for tree, _ in leaves], texts, prompt_ends=ends))
    finally:
        judge.close()
    changed, failed, right = [], [], 0
    for row, (tree, leaf) in enumerate(leaves):
        segment, outcomes = tree.segments[leaf], {name: column[row] for name, column in found.items()}
        before = segment.reward
        verdict = judge.combine(outcomes)
        segment.reward, segment.rewards = verdict.reward, verdict.parts
        judged = fitting(outcomes)
        right += all(map(is_right, judged.values()))
        if _single(before) != _single(segment.reward):
            changed.append({"id": tree.problem.id, "segment": leaf, "before": before, "after": segment.reward})
        if not all(map(is_right, judged.values())):
            parts = {name: outcome_reward(outcome) for name, outcome in judged.items()}
            reason = next((o.message for o in judged.values() if o.message), "")
            failed.append({"id": tree.problem.id, "segment": leaf, "rewards": parts, "reason": reason})
    Console().print(
        f"{source}: {right} of {len(leaves)} completions accepted; {len(changed)} rewards differ from the saved ones",
        highlight=False,
        soft_wrap=True,
    )
    if rollouts_out is not None:
        segments = [str(s.extra.pop("text", "")) for tree in trees for s in tree.segments]
        write_trees(rollouts_out, Forest.from_trees(trees), texts=segments)
    if out is not None:
        numbers = {"accepted": right, "total": len(leaves), "failed": failed, "changed": changed}
        out.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _single(reward: float | None) -> float | None:
    """As records have it, in fp32."""
    import numpy

    return None if reward is None else float(numpy.float32(reward))


def with_data(trees: "list[Tree]", problems: "list[Problem]", source: str, data: str) -> None:
    """Give each tree the answer and columns of its problem, found by its id or by a question that its prompt has."""
    known = {problem.id: problem for problem in problems}
    for tree in trees:
        asked = [problem for problem in problems if _asks(tree, problem)] if tree.problem.id not in known else []
        found = known.get(tree.problem.id) or max(asked, key=lambda each: len(str(each.question)), default=None)
        if found is None:
            raise UserError(f"{source}: problem '{tree.problem.id}' is not in {data}, by its id or its question")
        tree.problem = replace(found, question=tree.problem.question)


def _asks(tree: "Tree", problem: "Problem") -> bool:
    question, prompt = problem.question, tree.problem.question
    if question == prompt:
        return True
    if "id" in tree.extra.get("without", ()) and isinstance(prompt, str):
        return (question if isinstance(question, str) else str(question[-1].get("content"))) in prompt
    return False


def _leaves(tree: "Tree") -> Iterable[int]:
    parents = {segment.parent for segment in tree.segments}
    return (index for index in range(len(tree.segments)) if index not in parents)


def _text(tree: "Tree", leaf: int, source: str) -> str:
    """The text of the completion that ends in this leaf."""
    parts, at = [], leaf
    while at >= 0:
        segment = tree.segments[at]
        if not isinstance(segment.extra.get("text"), str):
            raise UserError(f"{source}: problem '{tree.problem.id}', segment {at}: no text, so it cannot be graded")
        parts.append(segment.extra["text"])
        at = segment.parent
    return "".join(reversed(parts))
