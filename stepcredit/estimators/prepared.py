"""Rewards of the reference on each problem, sampled once and kept in a file that many runs read.

JSON lines: first what they were made with, then one line for each problem. A preparation that is stopped or killed goes
on where it was and ends with the same bytes, because problems go through in batches that depend on nothing but their
number, and of a batch that is not whole everything is done again.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import segment_sum
from stepcredit.forest.types import Problem
from stepcredit.growth.flat import flat
from stepcredit.growth.rollouts import Rollouts
from stepcredit.samplers.params import SamplingParams
from stepcredit.seeds import PREPARATION, sampling_seed
from stepcredit.tasks.base import canonical

log = logging.getLogger("stepcredit")

VERSION = 1
ROUNDS = 4  # of the sampler's rows in one batch of problems: what a kill can lose
PROMPT = ("system_prompt", "prompt_template", "chat_template", "chat_template_kwargs")
JUDGING = ("options", "kinds", "kind_column", "skip_special_tokens", "on_failure")

Show = Callable[[int, int], None]  # completions so far, and in all


@dataclass(frozen=True)
class Sampled:
    """The samples of one problem.

    Attributes:
        problem: a hash of its contents, so that another problem of the same id is found out.
        rewards: of each sample; None where it was not judged.
        tokens: sampled, of all of them.
    """

    id: str
    problem: str
    rewards: list[float | None]
    tokens: int


@dataclass(frozen=True)
class Prepared:
    """
    Attributes:
        header: what the samples were made with: `stamp` is what a run that reads them must have too.
        rows: by problem, in the order in which they were sampled.
        cut: the last line was cut short.
    """

    header: Mapping[str, Any]
    rows: list[Sampled]
    cut: bool = False

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)


def digest(problem: Problem) -> str:
    return hashlib.sha256(canonical(problem)).hexdigest()[:16]


def header_of(config: Config, rollouts: Rollouts, weights: int) -> dict[str, Any]:
    """What samples depend on.

    Args:
        weights: fingerprint of the reference.
    """
    judge = rollouts.judge
    return {
        "prepared": "value",
        "version": VERSION,
        "model": config.model,
        "stamp": {
            "weights": f"{weights:x}",
            "prepare": {"num_samples": config.prepare.num_samples},
            "sampler": {name: getattr(config.sampler, name) for name in SamplingParams.model_fields},
            "task": {name: getattr(config.task, name) for name in PROMPT},
            "reward": {
                "functions": list(judge.rewards),
                "weights": list(judge.weights),
                **{name: getattr(config.reward, name) for name in JUDGING},
            },
        },
        "order": {"seed": config.train.seed, "max_rows": rollouts.sampler.max_rows},
    }


# ---------------------------------------------------------------------- the file


def read_prepared(path: Path) -> Prepared:
    """
    Raises:
        UserError: it is not such a file, or a line other than the last cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it with 'stepcredit prepare --out {path}'")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    header = _parsed(lines[0])
    if header is None or header.get("prepared") != "value":
        raise UserError(f"{path}, line 1: this is not a file of 'stepcredit prepare'")
    if header.get("version") != VERSION:
        raise UserError(f"{path}: version {header.get('version')!r} is not known; this program reads version {VERSION}")
    rows: list[Sampled] = []
    ids: dict[str, int] = {}
    for number, line in enumerate(lines[1:], 2):
        last = number == len(lines)
        row = _row(line)
        if row is None and not last:
            raise UserError(f"{path}, line {number}: cannot be read; remove the file and prepare it again")
        if row is None or last:  # a whole line has an end
            continue
        if len(row.rewards) != header["stamp"]["prepare"]["num_samples"]:
            raise UserError(
                f"{path}, line {number}: problem '{row.id}' has {len(row.rewards)} rewards, and line 1 says "
                f"{header['stamp']['prepare']['num_samples']} samples of each; prepare it again"
            )
        if row.id in ids:
            raise UserError(f"{path}, line {number}: problem '{row.id}' stands in line {ids[row.id]} already")
        ids[row.id] = number
        rows.append(row)
    return Prepared(header, rows, cut=bool(lines[-1]))


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _row(line: str) -> Sampled | None:
    found = _parsed(line)
    if found is None or found.keys() != Sampled.__annotations__.keys() or not isinstance(found["rewards"], list):
        return None
    known = [value for value in found["rewards"] if value is not None]
    numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in [*known, found["tokens"]])
    return Sampled(**found) if numbers else None


def _text(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def differences(made: Any, now: Any, name: str = "") -> list[str]:
    """Options that are not the same, with both values."""
    if isinstance(made, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*now, *made]))
        return [each for key in keys for each in differences(made.get(key), now.get(key), f"{name}.{key}".strip("."))]
    return [] if made == now else [f"{name} {made!r:.60}, not {now!r:.60}"]


def check_stamp(where: str, made: Mapping[str, Any], now: Mapping[str, Any], what_to_do: str) -> None:
    """
    Args:
        where: the file, and the option that names it.

    Raises:
        UserError: the samples of a file were made with something else than is asked for now, naming all of it.
    """
    wanted = json.loads(json.dumps(now))  # as it comes back from a file
    found = differences(made.get("stamp"), wanted["stamp"])
    if found and found[0].startswith("weights "):
        found[0] = f"the weights of '{made.get('model')}', not those of '{now['model']}'"
    if found:
        raise UserError(f"{where} was made with {'; '.join(found)}. {what_to_do}")


# ---------------------------------------------------------------------- making it


def make_prepared(
    path: Path,
    header: Mapping[str, Any],
    rollouts: Rollouts,
    problems: Sequence[Problem],
    show: Show,
    check: Callable[[], None] = lambda: None,
) -> Prepared:
    """Sample and judge what the file lacks of these problems; all processes of a run call this.

    The sampler has the reference's weights.

    Args:
        check: called by all processes after each batch, when it is in the file.

    Raises:
        UserError: the file has samples that were made with something else, or of other problems.
    """
    count, ranks = header["stamp"]["prepare"]["num_samples"], rollouts.ranks
    size = max(1, ROUNDS * rollouts.sampler.max_rows // count)
    known = ranks.on_main(lambda: _begin(path, header, problems, size))
    total = len(problems) * count
    for start in range(known, len(problems), size):
        batch = problems[start : start + size]
        with _watched(rollouts, lambda done, start=start: show(start * count + done, total)):  # type: ignore[misc]
            rows = _sample(rollouts, batch, start, header["order"]["seed"], count)
        ranks.on_main(lambda rows=rows: _append(path, rows))  # type: ignore[misc]
        show(min(total, (start + size) * count), total)
        check()
    return ranks.on_main(lambda: read_prepared(path))


def _begin(path: Path, header: Mapping[str, Any], problems: Sequence[Problem], size: int) -> int:
    """How many problems are done, after what is not whole was cut from the file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if _text([header]).startswith(text):  # nothing, or this header cut short
        _write(path, _text([header]))
        return 0
    there = read_prepared(path)
    hint = "Give the same options to go on with it, remove it, or name another file"
    check_stamp(str(path), there.header, header, hint)
    for number, (row, problem) in enumerate(zip(there.rows, problems, strict=False), 2):
        if (row.id, row.problem) != (problem.id, digest(problem)):
            raise UserError(
                f"{path}, line {number} is of problem '{row.id}', and here comes '{problem.id}' or another of that id: "
                f"the data, or how many are drawn, have changed. {hint}"
            )
    known = len(there.rows)
    if known >= len(problems):
        return known
    if found := differences(there.header.get("order"), header["order"]):
        raise UserError(f"{path} was begun with {'; '.join(found)}. {hint}")
    known -= known % size
    if there.cut or known < len(there.rows):
        _write(path, _text([there.header, *map(asdict, there.rows[:known])]))
    if known:
        log.warning("%s: going on behind the first %d of %d problems", path, known, len(problems))
    return known


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".part-{path.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _append(path: Path, rows: Sequence[Sampled]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_text([asdict(row) for row in rows]))


@contextmanager
def _watched(rollouts: Rollouts, show: Callable[[int], None]) -> Iterator[None]:
    """Show the sampler's progress, of all processes by this one's, beside what it reports to anyway."""
    sampler, before, done = rollouts.sampler, rollouts.sampler.on_progress, 0

    def progress(count: int) -> None:
        nonlocal done
        done += count * rollouts.ranks.size
        before(count)
        show(done)

    sampler.on_progress = progress
    try:
        yield
    finally:
        sampler.on_progress = before


def _sample(rollouts: Rollouts, batch: Sequence[Problem], start: int, seed: int, count: int) -> list[Sampled]:
    """The samples of a batch; each process draws its share.

    Args:
        start: number of its first problem, which numbers the seeds.
    """
    mine = rollouts.ranks.share(range(len(batch)))
    rows: list[Sampled] = []
    if mine:
        own = [batch[number] for number in mine]
        seeds = [sampling_seed(seed, PREPARATION, start + number) for number in mine]
        rows = _rows(rollouts.judge(flat(rollouts.sampler, own, rollouts.encode, rollouts.params, seeds, count)))
    gathered = [row for part in rollouts.ranks.gather(rows) for row in part]
    order = {problem.id: number for number, problem in enumerate(batch)}
    return sorted(gathered, key=lambda row: order[row.id])


def _rows(forest: Forest) -> list[Sampled]:
    rewards: list[list[float | None]] = [[] for _ in forest.problems]
    segment = forest.segment
    columns = (segment[name].tolist() for name in ("tree", "reward", "has_reward", "is_leaf"))
    for tree, reward, judged, leaf in zip(*columns, strict=True):
        if leaf:
            rewards[tree].append(reward if judged else None)
    tokens = segment_sum(forest.token_sampled.long(), forest.token_tree, forest.num_trees).tolist()
    return [
        Sampled(problem.id, digest(problem), rewards[row], tokens[row]) for row, problem in enumerate(forest.problems)
    ]
