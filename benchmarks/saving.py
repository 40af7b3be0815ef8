"""What checkpoints cost: seconds of saving over seconds of a default run, or of the run that the options describe.

python benchmarks/saving.py [OPTIONS OF stepcredit train]
"""

import sys
import tempfile
import time
from pathlib import Path

from stepcredit.cli.main import main as stepcredit
from stepcredit.run import trainer


def main() -> None:
    save, taken = trainer.save_checkpoint, []

    def timed(*given: object) -> Path:
        started = time.perf_counter()
        folder = save(*given)  # type: ignore[arg-type]
        taken.append(time.perf_counter() - started)
        return folder

    trainer.save_checkpoint = timed
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        stepcredit(["train", *sys.argv[1:], "--run-dir", f"{folder}/run"])
        whole = time.perf_counter() - started
    print(f"{len(taken)} checkpoints took {sum(taken):.2f} s of {whole:.0f} s: {sum(taken) / whole:.2%}")


if __name__ == "__main__":
    main()
