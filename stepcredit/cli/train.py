"""`stepcredit train`."""

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepcredit.cli import help as help_text
from stepcredit.cli.arguments import parse
from stepcredit.config import Config, merge, resolve
from stepcredit.config.renamed import with_new_names
from stepcredit.errors import UserError
from stepcredit.imports import search_in, used_folders

if TYPE_CHECKING:
    from stepcredit.learn.placement import Placement

HELP = """\
usage: stepcredit train [CONFIG.yaml] [--option value ...]

Without options the embedded model learns the embedded task with GRPO: a few minutes on a laptop CPU.

  --algorithm NAME      {names}
  --model MODEL         embedded | folder | hub id
  --data DATA           embedded | file (.jsonl .json .csv .parquet) | hub id | gym:TASK, see 'stepcredit tasks';
                        comma between several, how often each by weights
  --iterations N        --group-size N       --learning-rate X      --seed N
  --run-dir FOLDER      new or empty; runs/ALGORITHM-NUMBER when not given
  --resume WHEN         never | auto (continue if the run folder has a checkpoint) | PATH of a run or checkpoint
  --device NAME         auto | cpu | cuda | mps
  --eval-every N        --save-every N       iterations; 0: only at the end
  --trust-remote-code true   run code that comes with a hub model; off when not given
  --shapers NAMES       in their order, comma between; those below or your own; with options as in YAML:
                        --shapers '[positives_only, {{name: overlong, buffer: 512}}]'
  --estimators {{COLUMN: NAME}}   builders of your own for columns that credit and loss read
  --code-folders FOLDERS   where code of your own (my_module.f, my_file.py:f) is looked for, beside this folder and that
                        of CONFIG.yaml

Algorithms, with the arXiv ids of their papers; 'stepcredit algorithms' says what each needs and costs
{algorithms}

Credit functions (credit.name; credit.sum adds several up), losses (loss.name) and shapers, with options of their own in
brackets (credit.OPTION)
{credits}
{losses}
{shapers}

All other options with their defaults (the algorithm and the embedded recipe change some; config.yaml in the run folder
has what was used); the same names make up a YAML file, with --section.option on top
{options}

Examples
  stepcredit train --model my-model --data problems.jsonl --task.columns.question problem --reward.functions math
  stepcredit train --model my-model --data problems.jsonl,gym:chain_sum,gcd --task.weights 2,1,1
  stepcredit train --algorithm treerpo --growth.num-branches 4 --growth.depth 3
  stepcredit train --credit.sum '[rloo, {{name: prime, part: process, weight: 0.5}}]'
  stepcredit train run.yaml --credit.beta 0.01 --optim.num-minibatches 2 --run-dir runs/spro
  stepcredit train --algorithm dpo --model my-model --data pairs.jsonl --loss.beta 0.1
  stepcredit train --algorithm sft --model my-model --data demonstrations.jsonl --train.problems-per-iteration 64
  stepcredit train --resume runs/spro
  stepcredit train --track.sinks tensorboard,wandb

Exit codes: 0 done, 1 nothing was learnt (0 under torchrun; the log says it), 2 something given is wrong, 70 a fault of
the program or of the user's code, with a traceback, 130 stopped by a signal"""

# What makes it another run when it changes.
OTHER_RUN = {"algorithm", "model", "task", "train.seed", "credit.name", "prm.reference", "prepare"} | {
    f"critic.{name}" for name in ("backbone", "loss", "low", "high", "num_bins")
}


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        from stepcredit.config.algorithms import ALGORITHMS

        names = " | ".join(list(ALGORITHMS)[:3]) + " | ... (below)"
        credits, losses = help_text.functions("credit", "credit"), help_text.functions("losses", "loss")
        options, shapers = help_text.options(), help_text.functions("shaping", "shaper")
        print(
            HELP.format(
                names=names,
                algorithms=help_text.algorithm_names(),
                credits=credits,
                losses=losses,
                shapers=shapers,
                options=options,
            )
        )
        return 0
    given, own = parse(words, {"config": None, "resume": "never"}, "train")
    config = resolve(given)

    import torch
    from rich.console import Console

    from stepcredit.learn.loading import load_model
    from stepcredit.policy.loading import pick_device
    from stepcredit.processes.ranks import Ranks
    from stepcredit.run.allocator import keep_freed_memory
    from stepcredit.run.build import build_parts, build_placement
    from stepcredit.run.checkpoint import read_pointer
    from stepcredit.run.interrupt import Interrupted
    from stepcredit.run.servers import choose_sampler
    from stepcredit.run.state import seed_generators
    from stepcredit.run.trainer import Trainer
    from stepcredit.samplers.table import AUTO

    ranks = Ranks.join(config.distributed.timeout_s, config.train.device)
    logging.basicConfig(level=logging.INFO if ranks.main else logging.ERROR, format="%(message)s")
    console = Console(quiet=not ranks.main)
    given, checkpoint = ranks.on_main(lambda: _resumed(given, own["resume"]))
    config = resolve(given)
    search_in(*config.code_folders)
    if config.sampler.temperature == 0:
        raise UserError("sampler.temperature: training needs samples, so a temperature above 0")
    run_dir = ranks.on_main(lambda: _run_dir(config, continues=own["resume"] != "never"))
    seed_generators(config.train.seed, ranks.rank)
    chosen = ""
    if config.sampler.name == AUTO:
        config, chosen = choose_sampler(config, build_placement(config, ranks), pick_device(config.train.device))
    parts = build_parts(config)
    placement = build_placement(config, ranks)
    policy = load_model(config, config.model, placement)
    if policy.device.type == "cpu":
        keep_freed_memory()
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time
    torch.manual_seed(config.train.seed)  # again: loading may have drawn
    if chosen:
        logging.getLogger("stepcredit").info("%s", chosen)
    trainer = Trainer(config, parts, policy, console, placement)
    run_dir = ranks.on_main(lambda: _claim(config, run_dir))
    if checkpoint is not None:
        try:
            trainer.load(checkpoint)
        except Interrupted:  # while something is prepared
            console.print(f"stopped; continue with --resume {run_dir}", highlight=False, soft_wrap=True)
            ranks.leave()
            return 130
        console.print(f"continuing {run_dir} after iteration {trainer.done}", highlight=False, soft_wrap=True)
    folders = list(dict.fromkeys([*config.code_folders, *used_folders()]))
    config = config.model_copy(update={"run_dir": str(run_dir), "code_folders": folders})
    ranks.on_main(lambda: _write_config(config, run_dir))
    console.print(
        f"{config.algorithm} on {trainer.rollouts.task.name}: {config.train.iterations} iterations of "
        f"{_size(config)}, in {run_dir}{_processes(placement)}",
        highlight=False,
        soft_wrap=True,
    )
    try:
        with closing(trainer.rollouts.sampler):
            learnt = trainer.run(run_dir)
        ranks.leave()
        return 0 if learnt or ranks.distributed else 1  # torchrun would report a crash
    except Interrupted:
        console.print(f"stopped and saved; continue with --resume {run_dir}", highlight=False, soft_wrap=True)
        ranks.leave()
        return 130
    except KeyboardInterrupt:
        newest = read_pointer(run_dir, "latest")  # no checksums now: this is in a hurry
        kept = f"what came after {newest.name} is lost; continue" if newest else "no checkpoint yet; start again"
        console.print(f"{kept} with --run-dir {run_dir} --resume auto", highlight=False, soft_wrap=True)
        raise


def _write_config(config: Config, run_dir: Path) -> None:
    from stepcredit.config import dump_yaml

    beside = run_dir / ".config.yaml.part"  # a run that is killed now still has the config that it had
    beside.write_text(dump_yaml(config), encoding="utf-8")
    beside.replace(run_dir / "config.yaml")


def _processes(placement: "Placement") -> str:
    return f", on {placement.ranks.size} processes ({placement.strategy})" if placement.ranks.distributed else ""


def _size(config: Config) -> str:
    growth = config.growth
    count = config.train.problems_per_iteration
    if growth.recorded:
        return f"{count} {growth.name}"
    if growth.name == "flat":
        return f"{count} problems x {growth.group_size} completions"
    return f"{count} problems x trees of {growth.num_branches} branches, {growth.depth} deep"


def _resumed(given: dict[str, Any], when: str) -> tuple[dict[str, Any], Path | None]:
    """The config to continue with (the run's own under what was given) and the checkpoint to load."""
    if when == "never":
        return given, None
    from stepcredit.run.checkpoint import newest_checkpoint

    if when == "auto":
        run_dir = Path(given.get("run_dir") or "")
        if not given.get("run_dir"):
            raise UserError("--resume auto needs --run-dir, the run to continue")
        checkpoint = newest_checkpoint(run_dir)
        if checkpoint is None:
            return given, None
        run_dir = run_dir.resolve()
    else:
        path = Path(when).resolve()
        if not path.is_dir():
            raise UserError(f"--resume: '{when}' is no folder; give auto, never, a run folder or a checkpoint folder")
        run_dir = path if (path / "config.yaml").is_file() else path.parent.parent
        found = newest_checkpoint(run_dir) if path == run_dir else path
        if found is None or not (run_dir / "config.yaml").is_file():
            raise UserError(f"--resume: '{when}' has no checkpoint to continue from")
        checkpoint = found
    elsewhere = given.get("run_dir")
    if elsewhere and Path(elsewhere).resolve() != run_dir:
        raise UserError(f"--resume continues {run_dir} in place; leave out --run-dir {elsewhere}")
    saved = _saved_config(run_dir, checkpoint)
    merged = merge(saved, given) | {
        "run_dir": saved.get("run_dir") if Path(str(saved.get("run_dir"))).resolve() == run_dir else str(run_dir)
    }
    for name, before, now in _changes(saved, merged):
        if name in OTHER_RUN or name.split(".")[0] in OTHER_RUN:
            raise UserError(f"--resume: the run has {name} {before}, not {now}; start a new run for that")
        logging.getLogger("stepcredit").warning("continuing with %s = %s (was %s)", name, now, before)
    return merged, checkpoint


def _saved_config(run_dir: Path, checkpoint: Path) -> dict[str, Any]:
    """The config of a run: its config.yaml, or the checkpoint's copy where that is damaged."""
    from stepcredit.config import read_yaml
    from stepcredit.run.checkpoint import load_checkpoint

    try:
        saved = read_yaml(str(run_dir / "config.yaml"))
    except UserError:
        saved = {}
    if "algorithm" in saved:
        return saved
    logging.getLogger("stepcredit").warning("%s is damaged; taking the checkpoint's", run_dir / "config.yaml")
    return with_new_names(load_checkpoint(checkpoint)["config"]) | {"run_dir": str(run_dir)}


def _changes(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [
            change for key in keys for change in _changes(before.get(key), now.get(key), f"{name}.{key}".strip("."))
        ]
    return [] if before == now else [(name, before, now)]


def _claim(config: Config, run_dir: Path) -> Path:
    """Make the run's folder; one that was not named is this run's alone, also when several start at once."""
    while config.run_dir is None:
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:
            run_dir = _run_dir(config, continues=False)
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


def _run_dir(config: Config, continues: bool) -> Path:
    """The run's folder; a non-empty one is only for continuing a run, from its start if it has no checkpoint yet."""
    if config.run_dir is None:
        number = 1
        while (path := Path("runs") / f"{config.algorithm}-{number}").exists():
            number += 1
        return path
    path = Path(config.run_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"run_dir: '{path}' is a file")
    is_run = continues and (path / "config.yaml").is_file()
    if not is_run and path.is_dir() and any(not inside.name.startswith(".") for inside in path.iterdir()):
        raise UserError(
            f"run_dir: '{path}' is not empty; name a new folder with --run-dir, or continue the run with --resume auto"
        )
    return path
