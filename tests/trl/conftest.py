"""TRL is imported while Python does not look into tests/, whose folders have the names of packages."""

import importlib
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
path = list(sys.path)
sys.path[:] = [place for place in path if Path(place).resolve() != TESTS]
try:
    importlib.import_module("trl.trainer.grpo_trainer")
except ModuleNotFoundError as error:
    if error.name not in ("trl", "trl.trainer"):
        raise
finally:
    sys.path[:] = path
