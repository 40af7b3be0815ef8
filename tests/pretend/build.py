"""Compile the device, and load it before torch asks what devices there are."""

import ctypes
import importlib.util
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent / "device.cpp"


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def build(folder: Path) -> Path:
    """The compiled library, in this folder; takes about ten seconds."""
    library, torch = folder / "libpretend.so", torch_folder()
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch / 'include'}"]
    link = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run(["g++", *flags, str(SOURCE), *link, "-o", str(library)], check=True)
    return library


def load(library: Path) -> None:
    """Before `import torch`: the first import notes whether there is CUDA."""
    ctypes.CDLL(str(library))
