"""Makes an environment with verl's estimators and V1 utilities on a CPU: python tests/verl/install.py FOLDER

verl's own requirements would bring Ray's dashboard, wandb and an older transformers, and our constraints hold antlr4 at
another version than Hydra's grammar needs; so what these modules import is installed, and verl alone beside it.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = ["antlr4-python3-runtime==4.9.3", "pytest"]
NEEDED = [
    *("antlr4-python3-runtime==4.9.3", "hydra-core", "ray==2.60.0", "torchdata", "codetiming", "uvicorn", "fastapi"),
    *("pyzmq", "msgspec", "prometheus-client", "cachetools", "aiohttp", "pillow", "cloudpickle", "orjson"),
]
ALONE = ["verl==0.9.1", "TransferQueue==0.1.11", "tensordict==0.10.0", "pyvers==0.1.0"]  # they exclude what others need


def main(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    with tempfile.TemporaryDirectory() as place:
        constraints = Path(place, "constraints.txt")
        constraints.write_text("\n".join(line for line in lines if not line.startswith("antlr4")))
        held = [*pip, "--constraint", str(constraints)]
        subprocess.run([*held, "torch"], check=True)
        subprocess.run([*held, "--editable", str(ROOT), *OURS], check=True)
        subprocess.run([*held, *NEEDED], check=True)
    subprocess.run([*pip, "--no-deps", *ALONE], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
