"""Does process credit fall where the first wrong line is? On saved rollouts of the embedded task, checked line by line.

Of each wrong completion the line with the lowest mean process reward is taken for the first wrong one. Process reward
is the log-ratio of the process reward model to its reference where a run has one (PRIME), else of the policy to its
reference (SPRO). `precision` is the share that is right, `chance` what a line taken at random would give; a
completion's last line is its answer, and those whose only wrong line is the answer count too. `best AUC` and `late AUC`
are the reward model's on fresh rollouts: the highest mean of ten iterations within the first 100, and of the last 20.

With `--credit` the line with the lowest mean advantage is taken instead, under each of these credit functions, as the
report's credit comparison has it: over all runs together, completions whose lines get different advantages.

python benchmarks/first_wrong_line.py RUN [RUN ...] [--last 3] [--credit treerpo grpo]
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from stepcredit.demo.chain import check_lines
from stepcredit.display.rollouts import read_groups
from stepcredit.display.runs import read_runs
from stepcredit.display.token_texts import token_texts_of
from stepcredit.forest.records import read_trees
from stepcredit.forest.types import Segment
from stepcredit.policy.loading import load_policy
from stepcredit.report.credits import compare_credits


def lines_of(ids: list[int], stop: int) -> list[tuple[int, int]]:
    """First and last token (exclusive) of each line; the answer is the last."""
    ends = [place + 1 for place, token in enumerate(ids) if token == stop]
    starts = [0, *ends]
    return [(start, end) for start, end in zip(starts, [*ends, len(ids)], strict=True) if end > start]


def process_rewards(segment: Segment) -> list[float] | None:
    first = "prm_logprobs" if "prm_logprobs" in segment.columns else "old_logprobs"
    if first not in segment.columns or "ref_logprobs" not in segment.columns:
        return None
    return [one - ref for one, ref in zip(segment.columns[first], segment.columns["ref_logprobs"], strict=True)]


def measure(run: Path, last: int, stop: int) -> tuple[int, float, float]:
    """Wrong completions, precision and chance, over the last files of rollouts."""
    hits: list[float] = []
    chances: list[float] = []
    for path in sorted((run / "rollouts").glob("[0-9]*.jsonl.zst"))[-last:]:
        for tree in read_trees(str(path)):
            for segment in tree.segments:
                rewards, ids = process_rewards(segment), list(segment.token_ids)
                if rewards is None or segment.parent >= 0 or segment.finish != "stop" or segment.reward != 0:
                    continue
                checks = check_lines(str(tree.problem.question), str(segment.extra["text"]))
                lines = lines_of(ids, stop)
                if len(lines) != len(checks):  # the lines do not have their form
                    continue
                means = [statistics.mean(rewards[start:end]) for start, end in lines]
                wrong = next(number for number, check in enumerate(checks) if not check.ok)
                hits.append(float(means.index(min(means)) == wrong))
                chances.append(1 / len(lines))
    return len(hits), statistics.mean(hits) if hits else 0.0, statistics.mean(chances) if chances else 0.0


def auc(run: Path) -> tuple[float, float]:
    """Of the reward model on fresh rollouts: the highest mean of ten iterations within the first 100; the last 20's."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [row["prm/auc"] for row in rows if row.get("prm/auc") is not None][:100]
    if len(found) < 20:
        return math.nan, math.nan
    windows = [statistics.mean(found[end - 10 : end]) for end in range(10, len(found) + 1)]
    return max(windows), statistics.mean(found[-20:])


def by_credit(runs: list[Path], last: int, names: list[str]) -> None:
    """A line for each credit function: wrong completions, the share told apart, and of those the share found."""
    total = {name: [0.0] * 4 for name in names}
    for run in read_runs([str(path) for path in runs]):
        token_texts = token_texts_of(run)
        for iteration in sorted(run.files)[-last:]:
            groups = read_groups(run, iteration, token_texts)
            for name, detection in compare_credits(run, groups, names).first_error.items():
                told = detection.count * (1 - detection.uniform)
                hits, chances = told * (detection.accuracy or 0.0), told * (detection.chance or 0.0)
                counts = (detection.count, told, hits, chances)
                total[name] = [one + other for one, other in zip(total[name], counts, strict=True)]
    print(f"{'credit':24}{'wrong':>7}{'told apart':>12}{'found':>8}{'chance':>8}")
    for name, (count, told, hits, chances) in total.items():
        shares = f"{hits / told:8.1%}{chances / told:8.1%}" if told else f"{'-':>8}{'-':>8}"
        print(f"{name:24}{count:7.0f}{told / max(1, count):12.1%}{shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--last", type=int, default=3, help="files of rollouts from the end of each run")
    parser.add_argument("--credit", nargs="+", help="credit functions whose advantages are looked at")
    given = parser.parse_args()
    if given.credit:
        by_credit(given.runs, given.last, given.credit)
        return
    stop = load_policy("embedded", "cpu").tokenizer.convert_tokens_to_ids(".")
    found = []
    print(f"{'run':50}{'wrong':>7}{'precision':>11}{'chance':>8}{'best AUC':>10}{'late AUC':>10}")
    for run in given.runs:
        count, precision, chance = measure(run, given.last, stop)
        found.append((precision, chance))
        best, late = auc(run)
        print(f"{run.name:50}{count:7}{precision:11.1%}{chance:8.1%}{best:10.3f}{late:10.3f}")
    if len(found) > 1:
        precision, spread = (function([row[0] for row in found]) for function in (statistics.mean, statistics.stdev))
        print(f"mean {precision:.1%} ± {spread:.1%}, chance {statistics.mean(row[1] for row in found):.1%}")


if __name__ == "__main__":
    main()
