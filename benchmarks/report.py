"""How large the report of a run is, how long it takes to write, and how long a browser takes to open it.

Opening ends when the first curves are drawn, and when the first group of rollouts is; each in a new page of headless
Chromium, the middle of the repeats. Without RUN the embedded model is trained for 300 iterations with SPRO first.

python benchmarks/report.py [RUN ...] [--repeats 5] [--json FILE]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from stepcredit.cli.main import main as stepcredit
from stepcredit.display.runs import read_runs
from stepcredit.report.page import write_page

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from screenshots import WIDE, chromium, empty_page, show


def seconds_to_open(file: Path, view: str, repeats: int) -> float:
    found = []
    with chromium() as browser:
        for _ in range(repeats):
            page = empty_page(browser, WIDE)
            started = time.perf_counter()
            show(page, file, view)
            found.append(time.perf_counter() - started)
            page.close()
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not given.runs:
            given.runs = [f"{folder}/spro"]
            words = ["train", "--algorithm", "spro", "--iterations", "300", "--num-problems", "100"]
            stepcredit([*words, "--run-dir", given.runs[0]])
        file, runs = Path(folder) / "report.html", read_runs(given.runs)
        started = time.perf_counter()
        written = write_page(runs, file)
        result = {
            "runs": len(runs),
            "saved iterations": sum(len(run.files) for run in runs),
            "megabytes": written.size / 1e6,
            "seconds to write": time.perf_counter() - started,
            "seconds to open, curves": seconds_to_open(file, "curves", given.repeats),
            "seconds to open, rollouts": seconds_to_open(file, "rollouts", given.repeats),
        }
    for name, value in result.items():
        print(f"{name:28}{value:8.4g}")
    for remark in written.remarks:
        print(remark)
    if given.json:
        given.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
