"""A whole training step against TRL's `GRPOTrainer`, in one run: the same model, prompts, reward and update.

a        prompts of 32 tokens, completions of at most 64 that stop by themselves (about 24 on average)
b, c     prompts of 256 and 1024 tokens, completions of exactly 64 and 128

Both train a Qwen2 of about 3 million parameters in fp32 with GRPO, exactly on-policy: 8 completions of each prompt at
temperature 1, advantages over the group's deviation, means of means, no KL term, one AdamW step a batch; one reward
function in Python, called in the process. stepcredit has its defaults. TRL has what makes it fastest on a CPU: no
gradient checkpointing, sdpa, no cache in training passes, nothing logged or saved, and as many micro-batches as make
its step shortest, of the numbers given with `--micro-batches`. malloc keeps what it has, for both.

Every step of TRL is followed by one of stepcredit; seconds are the least of `--repeats` steps after one that warms up.
`update` is all that follows the credit. `peak` is the peak of a process of its own that took three steps, `added` what
these added to its peak before them (model, trainer and imports); TRL's depends on the size of its micro-batches, with
which its seconds hardly change.

`--model` takes a folder of your own, with rows of question and answer, through its chat template where it has one.
The reward `even` gives every group a gradient; `right` is the natural one, where stepcredit leaves out groups that
agree and steps differ: seconds are then the mean of the steps.

python benchmarks/versus.py --model FOLDER --data FILE.jsonl [--prompts 8] [--tokens 64] [--group 8]
    [--reward even|right]
python benchmarks/versus.py [--cases a b c] [--prompts N] [--repeats 5] [--micro-batches 2 4] [--threads N]
    [--json FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from memory import peak_mib
from steps import CASES, RATE, Case, folder_of, load, make_folder, make_trainer, take_step

from stepcredit.imports import by_name

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
PARTS = ("step", "sampling", "update")
STEPS_IN_MEMORY = 3

Seconds = dict[str, float]
Make = Callable[[Case, Path, int], Path]
REWARDS = {"even": "even.share_even", "right": "even.right"}


def ours(case: Case, folder: Path) -> Callable[[], Seconds]:
    """Takes a step of stepcredit."""
    trainer = make_trainer(case, folder)

    def step() -> Seconds:
        taken = take_step(trainer)
        seconds, length = taken.seconds, taken.metrics["completion/length"]
        return {"step": seconds["step"], "sampling": seconds["sample"], "update": seconds["learn"], "length": length}

    return step


def theirs(case: Case, folder: Path, parts: int, steps: int, between: Callable[[], Any]) -> tuple[Any, list[Seconds]]:
    """A trainer of TRL whose micro-batches have a `parts`-th of the rows, and where it notes its steps' seconds.

    Args:
        between: called after every step.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    taken: list[Seconds] = []
    now: Seconds = {}

    class Timed(GRPOTrainer):
        def _generate(self, prompts: list[Any]) -> Any:
            started = time.perf_counter()
            found = super()._generate(prompts)
            now["sampling"] = time.perf_counter() - started
            now["length"] = sum(map(len, found[1])) / len(found[1])
            return found

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            found = super()._generate_and_score_completions(inputs)
            now["scored"] = time.perf_counter()
            return found

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            now["begun"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended = time.perf_counter()
            taken.append({name: now[name] for name in ("sampling", "length")})
            taken[-1] |= {"step": ended - now["begun"], "update": ended - now["scored"]}
            between()

    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    model, tokenizer = load(folder)
    model.config.use_cache = False
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=case.rows // parts,
        gradient_accumulation_steps=parts,
        num_generations=case.group,
        max_completion_length=case.tokens,
        generation_kwargs={"use_cache": True},
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_steps=steps,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    chat = tokenizer.chat_template is not None
    prompts = [[{"role": "user", "content": row["question"]}] if chat else row["question"] for row in rows]
    data = Dataset.from_list([{"prompt": one, **row} for one, row in zip(prompts, rows, strict=True)])
    reward = by_name("reward", case.reward, {})
    trainer = Timed(model, reward, config, data, processing_class=tokenizer, callbacks=[Steps()])
    trainer.remove_callback(PrinterCallback)
    return trainer, taken


def run_theirs(case: Case, folder: Path, parts: int, steps: int, between: Callable[[], Any]) -> list[Seconds]:
    trainer, taken = theirs(case, folder, parts, steps, between)
    trainer.train()
    return taken


def typical(steps: list[Seconds], case: Case) -> Seconds:
    """Of each part after the first step: the least seconds, with a natural reward their mean; the mean of lengths."""
    later = steps[1:]
    taken = mean if case.reward == REWARDS["right"] else min
    return {name: taken(step[name] for step in later) for name in PARTS} | {
        "length": mean(step["length"] for step in later)
    }


def fastest(case: Case, folder: Path, shares: list[int]) -> int:
    """The number of micro-batches with which a step of TRL is shortest."""
    fitting = [parts for parts in shares if case.rows % parts == 0]
    found = {parts: typical(run_theirs(case, folder, parts, 3, lambda: None), case)["step"] for parts in fitting}
    print(", ".join(f"micro-batches of {case.rows // parts}: {found[parts]:.2f} s" for parts in fitting), flush=True)
    return min(fitting, key=lambda parts: found[parts])


def peaks(case: Case, folder: Path, side: str, parts: int) -> tuple[float, float]:
    """MiB of this process at its peak, and what the steps added to it."""
    if side == "stepcredit":
        step = ours(case, folder)
        before = peak_mib()
        for _ in range(STEPS_IN_MEMORY):
            step()
    else:
        trainer, _ = theirs(case, folder, parts, STEPS_IN_MEMORY, lambda: None)
        before = peak_mib()
        trainer.train()
    return peak_mib(), peak_mib() - before


def in_own_process(name: str, side: str, parts: int) -> dict[str, float]:
    """Peaks of a process that gets the same options as this one, and takes the steps of one side."""
    command = [sys.executable, *sys.argv, "--memory", name, side, str(parts)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(zip(("peak", "added"), map(float, printed.split()[-2:]), strict=True))


def measure(name: str, case: Case, make: Make, repeats: int, shares: list[int]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder = make(case, Path(place), 4 * case.prompts)
        parts = fastest(case, folder, shares)
        step = ours(case, folder)
        own: list[Seconds] = []
        their = run_theirs(case, folder, parts, repeats + 1, lambda: own.append(step()))
    found: dict[str, Any] = {"rows": case.rows, "micro_batch": case.rows // parts}
    for side, taken in (("trl", their), ("stepcredit", own)):
        found[side] = typical(taken, case) | in_own_process(name, side, parts)
    return found


def show(name: str, found: dict[str, Any]) -> None:
    trl, own = found["trl"], found["stepcredit"]
    for part in (*PARTS, "peak", "added"):
        unit, digits = ("MiB", 0) if part in ("peak", "added") else ("s", 3)
        label = f"{part}, {unit}"
        ratio = trl[part] / own[part] if own[part] else float("inf")
        print(f"{name:6}{label:14}{trl[part]:10.{digits}f}{own[part]:12.{digits}f}{ratio:8.2f}", flush=True)
    print(f"{name:6}{'mean length':14}{trl['length']:10.1f}{own['length']:12.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--prompts", type=int, help="prompts of a step, in place of the case's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4, 8, 16], help="numbers to try with TRL")
    parser.add_argument("--json", help="write the numbers here")
    parser.add_argument("--model", type=Path, help="a folder, in place of the cases")
    parser.add_argument("--data", type=Path, help="rows with question and answer, for --model")
    parser.add_argument("--tokens", type=int, default=64, help="of a completion at most, for --model")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt, for --model")
    parser.add_argument("--reward", choices=REWARDS, default="even", help="for --model")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if (given.model is None) != (given.data is None):
        parser.error("--model and --data go together")
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    cases = {name: replace(CASES[name], prompts=given.prompts or CASES[name].prompts) for name in given.cases}
    make: Make = make_folder
    if given.model is not None:
        reward = REWARDS[given.reward]
        cases = {"own": Case(0, given.tokens, given.prompts or 8, group=given.group, reward=reward)}

        def make(case: Case, place: Path, num_prompts: int) -> Path:
            return folder_of(given.model, given.data, place, num_prompts)

    if given.memory:
        name, side, parts = given.memory
        with tempfile.TemporaryDirectory() as place:
            print(*peaks(cases[name], make(cases[name], Path(place), 4 * cases[name].prompts), side, int(parts)))
        return
    print(f"TRL over stepcredit; {given.threads} threads, least of {given.repeats}")
    results = {}
    for name, case in cases.items():
        lengths = f"of {case.prompt} tokens" if case.prompt else f"of {given.data}"
        print(f"{name}: {case.prompts} prompts {lengths} x {case.group} completions of {case.tokens}")
        found = results[name] = measure(name, case, make, given.repeats, given.micro_batches)
        print(f"of these, TRL's steps have micro-batches of {found['micro_batch']} completions")
        print(f"{'case':6}{'part':14}{'TRL':>10}{'stepcredit':>12}{'ratio':>8}")
        show(name, found)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as out_file:
            json.dump({"threads": given.threads, "cases": results}, out_file, indent=1)


if __name__ == "__main__":
    settings = {f"MALLOC_{name}_": str(size) for name, size in MALLOC.items()}
    if settings.items() <= os.environ.items():
        main()
    else:  # malloc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)
