"""Rollouts as trees (`types`), as columns (`forest`), operations along them (`ops`), and as files (`records`).

`from stepcredit.forest import Forest` works, but nothing is loaded before it is asked for: worker processes of reward
functions need `types` and must start without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepcredit.forest.forest import FINISH_CODE, Forest, Table

__all__ = ["FINISH_CODE", "Forest", "Table"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from stepcredit.forest import forest

    return getattr(forest, name)
