"""What a whole step of other algorithms takes in units of GRPO's, with a gradient in every group.

All train one model on the same prompts and completions: each round every algorithm takes a step with the problems and
seeds of the first one, so that they differ in their passes alone. Seconds are the least of `--repeats` rounds after one
that warms up; what they are compared with is the first algorithm.

python benchmarks/algorithms.py [--algorithms grpo spro opo] [--repeats 5] [--threads N]
    [--model FOLDER --data FILE.jsonl] [--prompts 8] [--tokens 64] [--group 8]

Without `--model` the model and prompts are case b of versus.py.
"""

import argparse
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from steps import CASES, Case, Step, folder_of, make_folder, make_trainer, take_step

from stepcredit.run.allocator import keep_freed_memory

PARTS = ("sample", "observe", "learn", "step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=["grpo", "spro", "opo"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", type=Path, help="a folder")
    parser.add_argument("--data", type=Path, help="rows with question and answer, for --model")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of a completion at most, for --model")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    given = parser.parse_args()
    if (given.model is None) != (given.data is None):
        parser.error("--model and --data go together")
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    case = replace(CASES["b"], prompts=given.prompts, group=given.group)
    with tempfile.TemporaryDirectory() as place:
        if given.model is None:
            folder = make_folder(case, Path(place), given.prompts)
        else:
            case = Case(0, given.tokens, given.prompts, group=given.group)
            folder = folder_of(given.model, given.data, Path(place), given.prompts)
        trainers = {name: make_trainer(case, folder, algorithm=name) for name in given.algorithms}
        steps: dict[str, list[Step]] = {name: [] for name in trainers}
        for _ in range(given.repeats + 1):
            for name, trainer in trainers.items():
                steps[name].append(take_step(trainer, again=True))
    show({name: taken[1:] for name, taken in steps.items()}, given.threads)


def show(steps: dict[str, list[Step]], threads: int) -> None:
    lengths = {name: taken[0].metrics["completion/length"] for name, taken in steps.items()}
    print(f"seconds, least of {len(next(iter(steps.values())))}; {threads} threads; completions of", end=" ")
    print(f"{min(lengths.values()):.1f} to {max(lengths.values()):.1f} tokens on average")
    print(f"{'algorithm':20}{''.join(f'{part:>10}' for part in PARTS)}{'ratio':>8}")
    first = None
    for name, taken in steps.items():
        least = {part: min(step.seconds.get(part, 0.0) for step in taken) for part in PARTS}
        first = first or least["step"]
        print(f"{name:20}{''.join(f'{least[part]:10.2f}' for part in PARTS)}{least['step'] / first:8.2f}")


if __name__ == "__main__":
    main()
