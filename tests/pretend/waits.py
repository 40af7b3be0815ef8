"""Where the host waits for the device: in the passes of an optimiser step, and between decode steps.

Of an optimiser step all that adds up its gradient is counted, over its micro-batches. Completions of two lengths are
sampled, and their difference is what further decode steps cost, whatever is done once.

python -m pretend.waits LIBRARY         prints JSON
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pretend.build import load

EVEN = f"{Path(__file__).parents[2] / 'benchmarks' / 'even.py'}:share_even"
CONFIG: dict[str, Any] = {
    "algorithm": "grpo",
    "objective": {"kl": {"coef": 0.01}, "entropy_coef": 0.01},
    "growth": {"group_size": 4},
    "sampler": {"max_new_tokens": 12, "temperature": 3.0, "max_rows": 32},
    "reward": {"functions": [EVEN], "workers": 0, "gold_check": 0},
    "train": {"problems_per_iteration": 8, "device": "cuda"},
    "eval": {"num_problems": 0},
}
LENGTHS = (32, 64)  # of completions
MAX_TOKENS = 160  # positions of a micro-batch: two or three trees


def each(counts: Counter[tuple[str, str]], number: int) -> dict[str, Any]:
    """What was counted, for each of `number` pieces of work."""
    where = {" ".join(key): count / number for key, count in counts.most_common()}
    return {"each": counts.total() / number, "number": number, "where": where}


def micro_batches(observer: Any) -> dict[str, Any]:
    from rich.console import Console

    from stepcredit.config import resolve
    from stepcredit.policy.loading import load_policy
    from stepcredit.run.build import build_parts
    from stepcredit.run.trainer import Trainer

    config = resolve(CONFIG)
    trainer = Trainer(config, build_parts(config), load_policy("embedded", "cuda"), Console(quiet=True))
    work, update = trainer.begin(), trainer.policy_update
    accumulate, results = update.learner.accumulate, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        observer.clear()
        parts, values = accumulate(*args, **kwargs)
        results.append(each(observer.waits, len(parts)))
        return parts, values

    update.learner.accumulate = counted
    update.learner.max_tokens = MAX_TOKENS
    for _ in range(2):  # the first pass tries kernels out
        for step in update.steps(work.forest, 1):
            update.take(step)
    return results[1]


def decode_steps(observer: Any) -> dict[str, Any]:
    from stepcredit.policy.loading import load_policy
    from stepcredit.samplers.params import SamplingParams
    from stepcredit.samplers.transformers import TransformersSampler

    sampler = TransformersSampler(load_policy("embedded", "cuda"), max_rows=12)
    prompts = [[1, 5, 6, 7], [1, 9, 8], [1, 4, 7, 6, 9, 3]]
    counts = []
    for length in LENGTHS:
        observer.clear()
        params = SamplingParams(max_new_tokens=length, stop_token_ids=())
        segments = sampler.sample(prompts, 4, params, range(len(prompts)))
        assert all(len(one.token_ids) == length for group in segments for one in group)
        counts.append(observer.waits.copy())
    return each(counts[1] - counts[0], LENGTHS[1] - LENGTHS[0])


def measure() -> dict[str, Any]:
    from pretend.install import install

    observer = install()
    with observer:
        return {"micro_batch": micro_batches(observer), "decode_step": decode_steps(observer)}


if __name__ == "__main__":
    load(Path(sys.argv[1]))
    print(json.dumps(measure(), indent=1))
