"""What to train on. `build_task` makes a Task from the config's `task` section."""

from stepcredit.config import TaskConfig
from stepcredit.tasks.base import Task


def build_task(config: TaskConfig, seed: int) -> Task:
    """The embedded task, or a data set with a held-out part."""
    if config.data == "embedded":
        from stepcredit.tasks.embedded import EmbeddedTask

        return EmbeddedTask(seed)
    from stepcredit.tasks.dataset import DatasetTask, load_problems, split_held_out

    train = load_problems(config.data, config.split, config.columns)
    if config.eval_data:
        held_out = load_problems(config.eval_data, config.eval_split, config.columns)
    else:
        train, held_out = split_held_out(train, config.held_out, seed=0)
    return DatasetTask(config.data, train, held_out, seed)
