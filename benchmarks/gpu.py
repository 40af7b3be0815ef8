"""stepcredit on one GPU, in stages that take ten minutes at most and need no network. docs/gpu.md says what to bring.

check     kernels against fp64, greedy sampling, whole runs of the embedded task with and without torchrun
update    forward and backward of groups and trees: share of the measured matrix rate, one row per completion or node
          beside it, TRL's update beside it (where trl is installed), and the kernels that take the time
decode    tokens a second for 64 to 1,024 rows, with and without CUDA graphs, and the share of what memory allows
step      a whole training step against TRL's GRPOTrainer in bf16, and three seeds of the embedded task

Every case is written to the JSON file as soon as it is measured; what is there already is not measured again. A case
that is out of memory goes on with half of it; one that fails is noted with its error, and the exit code is 1.

python benchmarks/gpu.py --stage check --json gpu.json [--only attention] [--again]
python benchmarks/gpu.py --stage update --shapes 0.5b 1.5b --json gpu.json [--budget 16384] [--repeats 3]
python benchmarks/gpu.py --stage decode --device cpu --shapes tiny        to try the script without a GPU
"""

import argparse
import importlib
import warnings
from pathlib import Path

import torch
from gpu_stages.bench import Bench
from gpu_stages.shapes import SHAPES

STAGES = ("check", "update", "decode", "step")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5b", "1.5b"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=int, default=1 << 14, help="token positions of a micro-batch, for all forms")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers here, beside those that are there")
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name holds one of these texts")
    parser.add_argument("--again", action="store_true", help="measure what is in the file too")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --shapes tiny tries the script without one")
    warnings.simplefilter("ignore")
    device = torch.device(given.device)
    bench = Bench(given.stage, device, given.shapes, given.repeats, given.budget, given.json, given.only, given.again)
    print(", ".join(f"{name} {value}" for name, value in bench.results["machine"].items()), flush=True)
    importlib.import_module(f"gpu_stages.{given.stage}").run(bench)
    if bench.failed:
        print(f"{len(bench.failed)} cases failed: {', '.join(bench.failed)}")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
