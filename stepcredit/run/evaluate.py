"""What a model gets right on held-out problems: pass@1, pass@k, majority votes, with intervals."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from stepcredit.forest import Forest
from stepcredit.forest.types import FINISHES, Problem
from stepcredit.growth.flat import flat
from stepcredit.growth.rollouts import Rollouts
from stepcredit.run.by_source import NO_SOURCES, Sources
from stepcredit.run.options import EvalOptions
from stepcredit.seeds import EVALUATION, sampling_seed
from stepcredit.verifiers.judging import completion_ids

log = logging.getLogger("stepcredit")

SameAnswer = Callable[[str, str], bool]
MAX_COMPARISONS = 5000  # of different final answers of a problem
RESAMPLES, RESAMPLES_AT_ONCE = 2000, 50  # of the bootstrap
ROUNDS = 4  # of the sampler's rows in one batch of problems: what a kill can lose


@dataclass(frozen=True)
class Sample:
    """One completion of a problem, judged.

    Attributes:
        number: which of the problem's samples; -1 is the greedy one.
        correct: the first reward function gave it 1 or more.
        answer: what it comes to, where the reward function can tell.
        failure: "timeout" or "error" of a reward function, "" otherwise.
        source: of the problem.
    """

    id: str
    number: int
    completion: str
    length: int
    truncated: bool
    reward: float | None
    correct: bool
    answer: str | None = None
    failure: str = ""
    source: str = ""


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name (`eval/accuracy` ...), the bounds of their 95% intervals, and the samples they come from."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list, repr=False)


def evaluate(
    rollouts: Rollouts,
    problems: Sequence[Problem],
    num_samples: int,
    greedy: bool,
    seed: int,
    known: Iterable[Sample] = (),
    on_samples: Callable[[list[Sample]], None] = lambda samples: None,
    sources: Sources = NO_SOURCES,
) -> Evaluation:
    """Sample `num_samples` completions of each problem, and one greedily.

    Args:
        known: samples of an evaluation that was interrupted; their problems are not sampled again.
        on_samples: called with the samples of each finished batch of problems.
        sources: that have metrics of their own.

    The problems go through in batches that depend on nothing but their number, so that an evaluation that was
    interrupted ends with the same numbers.
    """
    by_id = group_by_id(known)
    wanted = num_samples + greedy
    size = max(1, ROUNDS * rollouts.sampler.max_rows // num_samples)
    samples: list[Sample] = []
    for start in range(0, len(problems), size):
        batch = problems[start : start + size]
        if all(len(by_id.get(problem.id, ())) == wanted for problem in batch):
            samples += [sample for problem in batch for sample in by_id[problem.id]]
            continue
        seeds = [sampling_seed(seed, EVALUATION, start + number) for number in range(len(batch))]
        mine = rollouts.ranks.share(range(len(batch)))
        own, own_seeds = [batch[number] for number in mine], [seeds[number] for number in mine]
        made = _samples(rollouts, own, own_seeds, num_samples, greedy=False) if mine else []
        if greedy and mine:
            made += _samples(rollouts, own, own_seeds, 1, greedy=True)
        made = [sample for part in rollouts.ranks.gather(made) for sample in part]
        order = {problem.id: number for number, problem in enumerate(batch)}
        made.sort(key=lambda sample: order[sample.id])
        on_samples(made)
        samples += made
    return summarise(samples, next(iter(rollouts.judge.rewards.values())).same_answer, sources)


def held_out_metrics(
    rollouts: Rollouts, problems: Sequence[Problem], given: EvalOptions, sources: Sources = NO_SOURCES
) -> dict[str, float]:
    """Accuracy while a run trains: the same problems and seeds every time; nothing without problems."""
    started = time.monotonic()
    if not problems:
        return {}
    result = evaluate(rollouts, problems, given.num_samples, given.greedy, seed=0, sources=sources)
    return result.metrics | {"time/eval": time.monotonic() - started}


def _samples(
    rollouts: Rollouts, problems: Sequence[Problem], seeds: Sequence[int], count: int, greedy: bool
) -> list[Sample]:
    params = rollouts.params.model_copy(update={"temperature": 0.0}) if greedy else rollouts.params
    forest = rollouts.judge(flat(rollouts.sampler, problems, rollouts.encode, params, seeds, count))
    return read_samples(forest, rollouts, [-1] if greedy else list(range(count)))


def read_samples(forest: Forest, rollouts: Rollouts, numbers: Sequence[int]) -> list[Sample]:
    """The completions of a judged forest, `numbers` of each problem."""
    leaves = forest.segment["is_leaf"].nonzero().squeeze(1).tolist()
    ids = [completion_ids(forest, leaf) for leaf in leaves]
    tokenizer = rollouts.encode.tokenizer
    texts = [str(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    found = []
    for row, (leaf, text) in enumerate(zip(leaves, texts, strict=True)):
        details = forest.details[leaf]
        name, value = next(iter(details["rewards"].items()))  # functions that the row is not for have no part
        final_answer = rollouts.judge.rewards[name].final_answer
        problem = forest.problems[int(forest.segment["tree"][leaf])]
        found.append(
            Sample(
                id=problem.id,
                number=numbers[row % len(numbers)],
                completion=text,
                length=len(ids[row]),
                truncated=FINISHES[int(forest.segment["finish"][leaf])] == "length",
                reward=float(forest.segment["reward"][leaf]) if forest.segment["has_reward"][leaf] else None,
                correct=value is not None and value >= 1,
                answer=final_answer(text) if final_answer else None,
                failure=next(iter(details["extra"].get("failures", {}).values()), ""),
                source=problem.source,
            )
        )
    return found


# ---------------------------------------------------------------------- numbers


def summarise(
    samples: Sequence[Sample], same_answer: SameAnswer | None = None, sources: Sources = NO_SOURCES
) -> Evaluation:
    """Metrics over problems, each of which counts the same; n is the number of samples of a problem.

    - `eval/accuracy`: mean share of right samples (pass@1, avg@n); `eval/accuracy_greedy`: at temperature 0.
    - `eval/pass@k`: unbiased, for k = 2, 4, ... and n (`pass_at_k`).
    - `eval/maj@n`: the most frequent final answer is right (`majority`), where answers can be told.
    - `eval/reward`, `eval/length`, `eval/truncated`, `eval/timeout`, `eval/error`, `eval/unjudged`: over the samples.
    - `eval/accuracy/SOURCE` ...: all but the last three and majorities over the problems of one source.

    Unjudged completions count as wrong. Intervals are 95% percentile bootstraps over problems.
    """
    by_id = group_by_id(samples)
    columns = _columns(by_id)
    if not columns:
        return Evaluation({})
    sampled = _sampled(by_id)
    count = max(map(len, sampled))
    if count > 1 and any(sample.answer is not None for each in sampled for sample in each):
        columns[f"eval/maj@{count}"] = [majority(each, same_answer) for each in sampled]
    flat_samples = [sample for each in sampled for sample in each]
    metrics = {name: _mean(values) for name, values in columns.items()} | _over_samples(flat_samples)
    metrics |= {
        "eval/timeout": _mean([sample.failure == "timeout" for sample in flat_samples]),
        "eval/error": _mean([sample.failure == "error" for sample in flat_samples]),
        "eval/unjudged": _mean([sample.reward is None for sample in flat_samples]),
    }
    intervals = bootstrap(columns)
    for label in sources.labels:
        own = {id_: each for id_, each in by_id.items() if sources.label(each[0].source) == label}
        named = {f"{name}/{label}": values for name, values in _columns(own).items()}
        if named:
            numbers = _over_samples([sample for each in _sampled(own) for sample in each])
            metrics |= {name: _mean(values) for name, values in named.items()}
            metrics |= {f"{name}/{label}": value for name, value in numbers.items()}
            intervals |= bootstrap(named)
    return Evaluation(metrics, intervals, list(samples))


def _sampled(by_id: Mapping[str, Sequence[Sample]]) -> list[list[Sample]]:
    """The samples of each problem without the greedy one."""
    return [[sample for sample in each if sample.number >= 0] for each in by_id.values()]


def _columns(by_id: Mapping[str, Sequence[Sample]]) -> dict[str, list[float]]:
    """Accuracy, pass@k and greedy accuracy, a value for each problem; nothing without samples."""
    sampled = _sampled(by_id)
    count = max(map(len, sampled), default=0)
    if not count:
        return {}
    correct = [sum(sample.correct for sample in each) for each in sampled]
    columns = {"eval/accuracy": [c / count for c in correct]}
    for k in sorted({2**power for power in range(1, count.bit_length()) if 2**power <= count} | {count} - {1}):
        columns[f"eval/pass@{k}"] = [pass_at_k(count, c, k) for c in correct]
    greedy = [[float(sample.correct) for sample in each if sample.number < 0] for each in by_id.values()]
    if all(greedy):
        columns["eval/accuracy_greedy"] = [row[0] for row in greedy]
    return columns


def _over_samples(samples: Sequence[Sample]) -> dict[str, float]:
    return {
        "eval/reward": _mean([sample.reward for sample in samples if sample.reward is not None]),
        "eval/length": _mean([sample.length for sample in samples]),
        "eval/truncated": _mean([sample.truncated for sample in samples]),
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them right, drawn without return, have a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased for the chance of k fresh samples (arXiv 2107.03374).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} right among {n} samples is not defined")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(samples: Sequence[Sample], same_answer: SameAnswer | None = None) -> float:
    """Whether the most frequent final answer is right; tied answers share the vote. No answer at all is wrong.

    Of equal answers, judged differently because the verifier sees more of a completion, the share that is right counts.

    Args:
        same_answer: whether two final answers are one (`group_answers`); None compares them as text.
    """
    answered = [sample for sample in samples if sample.answer is not None]
    if not answered:
        return 0.0
    groups = group_answers([str(sample.answer) for sample in answered], same_answer)
    correct: dict[str, list[float]] = {}
    for sample in answered:
        correct.setdefault(groups[str(sample.answer)], []).append(float(sample.correct))
    most = max(map(len, correct.values()))
    return _mean([_mean(votes) for votes in correct.values() if len(votes) == most])


def group_answers(answers: Sequence[str], same_answer: SameAnswer | None = None) -> dict[str, str]:
    """For each answer the text that stands for its group.

    `same_answer` need not be transitive: 50% may be 50 and 0.5, which differ. So answers are not chained: from the most
    frequent text on (of equally frequent ones the shorter, then the first of the alphabet), each joins the first group
    whose own most frequent text it equals, else begins one. After `MAX_COMPARISONS` texts are groups of their own,
    with a warning.
    """
    counts = Counter(answers)
    if same_answer is None:
        return {answer: answer for answer in counts}
    groups: dict[str, str] = {}
    founders: list[str] = []
    comparisons = 0
    for answer in sorted(counts, key=lambda text: (-counts[text], len(text), text)):
        groups[answer] = answer
        for founder in founders[: MAX_COMPARISONS - comparisons]:
            comparisons += 1
            if same_answer(founder, answer):
                groups[answer] = founder
                break
        else:
            founders.append(answer)
    if comparisons == MAX_COMPARISONS:
        log.warning(
            "majority votes: a problem has %d different final answers; after %d comparisons they counted as text",
            len(counts),
            comparisons,
        )
    return groups


def bootstrap(columns: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """95% percentile intervals of the means, problems drawn with return; the same problems for every column."""
    names, values = list(columns), torch.tensor(list(columns.values()), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    size = values.shape[1]
    means = [
        values[:, torch.randint(size, (RESAMPLES_AT_ONCE, size), generator=generator)].mean(2)  # [columns, resamples]
        for _ in range(RESAMPLES // RESAMPLES_AT_ONCE)
    ]
    low, high = torch.cat(means, 1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1)
    return {name: (float(low[row]), float(high[row])) for row, name in enumerate(names)}


def group_by_id(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples of each problem, in the order of their numbers, the greedy one last."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.id, []).append(sample)
    return {id_: sorted(each, key=lambda s: (s.number < 0, s.number)) for id_, each in found.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
