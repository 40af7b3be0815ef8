"""What the choices of a CPU run are worth: steps with and without each, in processes of their own.

plain       all trees of a step in one micro-batch (`optim.max_tokens_per_micro_batch`), malloc as it is
parts       micro-batches that end where they are large enough for a CPU
kept        parts, and freed memory stays with the process: what `stepcredit train` does
bfloat16    kept, computing in bfloat16
one thread  kept, with one thread

The cases are those of versus.py; seconds are the least of `--repeats` steps after one that warms up.

python benchmarks/choices.py [--cases a b c] [--repeats 5]
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from memory import peak_mib
from steps import CASES, make_folder, make_trainer, take_step

from stepcredit.policy import forward
from stepcredit.run.allocator import keep_freed_memory

FORMS = ("plain", "parts", "kept", "bfloat16", "one thread")


def measure(name: str, form: str, repeats: int) -> None:
    """Print seconds of a step, its sampling and its update, and MiB that the steps added to the process's peak."""
    warnings.simplefilter("ignore")
    if form == "plain":
        forward.PREFERRED_TOKENS_ON_CPU = 1 << 60
    if form not in ("plain", "parts"):
        keep_freed_memory()
    if form == "one thread":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        trainer = make_trainer(CASES[name], make_folder(CASES[name], Path(place), 4 * CASES[name].prompts))
        if form == "bfloat16":
            trainer.policy.autocast = torch.bfloat16
        before = peak_mib()
        taken = [take_step(trainer, again=True).seconds for _ in range(repeats + 1)][1:]
    print(*(min(seconds[part] for seconds in taken) for part in ("step", "sample", "learn")), peak_mib() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.form:
        measure(given.cases[0], given.form, given.repeats)
        return
    print(f"{'case':6}{'form':12}{'step, s':>9}{'sampling':>10}{'update':>9}{'added, MiB':>12}")
    for name in given.cases:
        for form in FORMS:
            command = [sys.executable, __file__, "--cases", name, "--form", form, "--repeats", str(given.repeats)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            step, sampling, update, added = map(float, printed.split()[-4:])
            print(f"{name:6}{form:12}{step:9.3f}{sampling:10.3f}{update:9.3f}{added:12,.0f}", flush=True)


if __name__ == "__main__":
    main()
