"""Run commands of stepcredit on the pretend CUDA device, one after the other in one process.

python -m pretend.command LIBRARY FOLDER train --device cuda ...       by hand: FOLDER/by_hand.json is the report
python -m pretend.command LIBRARY FOLDER < COMMANDS                    {"name": ["train", ...], ...} as JSON

For each command FOLDER/NAME.json has its exit code and what `Observer` counted, FOLDER/NAME.log what it printed.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from pretend.build import load


def run_commands(library: Path, folder: Path, commands: dict[str, list[str]], environment: dict[str, str]) -> None:
    """Run them in a process of its own, whose environment lets it import stepcredit and this package."""
    subprocess.run(
        [sys.executable, "-m", "pretend.command", str(library), str(folder)],
        input=json.dumps(commands),
        text=True,
        env=environment,
        check=True,
        timeout=600,
    )


def run_here(folder: Path, commands: dict[str, list[str]]) -> None:
    from pretend.install import install

    observer = install()
    from stepcredit.cli.main import main

    for name, words in commands.items():
        observer.clear()
        print_into(folder / f"{name}.log")
        try:
            with observer:
                code: Any = main(words)
        except SystemExit as error:
            code = error.code
        except Exception:  # the others are to run: the code is the test's to look at
            traceback.print_exc()
            code = "exception"
        report = {"code": code, **observer.report()}
        (folder / f"{name}.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def print_into(file: Path) -> None:
    """Whatever this process prints from now on; by file descriptor, because logging keeps the streams."""
    sys.stdout.flush()
    sys.stderr.flush()
    with file.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


if __name__ == "__main__":
    load(Path(sys.argv[1]))
    run_here(Path(sys.argv[2]), {"by_hand": sys.argv[3:]} if sys.argv[3:] else json.load(sys.stdin))
