"""`stepcredit`: the command line. Heavy imports wait until a command really runs."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from stepcredit.errors import UserError, did_you_mean

HELP = """\
stepcredit: reinforcement learning of LLM reasoning with credit for every step

  stepcredit train      train a model on verifiable rewards
  stepcredit eval       accuracy of a model on held-out problems
  stepcredit sample     look at completions and their rewards
  stepcredit score      check a verifier on gold answers, grade a column or saved rollouts
  stepcredit credit     compute advantages of saved rollouts, without a model
  stepcredit audit      does credit tell the steps that help from those that harm: rollouts from every step
  stepcredit report     one page for the browser: curves, rollouts with the credit of every token, trees
  stepcredit show       the same in the terminal
  stepcredit compare    methods at equal sampled tokens, with intervals over seeds
  stepcredit algorithms what there is to train with, what it needs and costs
  stepcredit tasks      the tasks of reasoning-gym: options, levels, examples
  stepcredit prepare    values of prompts from samples of a reference, for A*-PO
  stepcredit plan       memory that a run takes on each GPU, and what fits
  stepcredit config     a config of TRL or verl as one of ours
  stepcredit merge      one model of LoRA adapters and their base
  stepcredit convert    a GGUF file as a folder that can be trained
  stepcredit warmstart  build the embedded base model anew

Examples
  stepcredit train                                       the embedded model learns on this machine, no download
  stepcredit train --algorithm spro --iterations 50
  stepcredit train --model my-model --data problems.jsonl --learning-rate 1e-6
  stepcredit credit --in rollouts.jsonl --out scored.jsonl --credit.name opo
  stepcredit report runs/grpo-1 runs/spro-1 -o report.html

Exit codes: 0 done, 1 nothing was learnt or too few gold answers accepted, 2 something given is wrong, 70 unexpected
error, 130 interrupted. 'stepcredit COMMAND --help' shows the options of a command."""

UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h


def _train(words: Sequence[str]) -> int:
    from stepcredit.cli.train import main

    return main(words)


def _eval(words: Sequence[str]) -> int:
    from stepcredit.cli.evaluate import main

    return main(words)


def _sample(words: Sequence[str]) -> int:
    from stepcredit.cli.look import sample

    return sample(words)


def _score(words: Sequence[str]) -> int:
    from stepcredit.cli.score import main

    return main(words)


def _credit(words: Sequence[str]) -> int:
    from stepcredit.cli.credit import main

    return main(words)


def _audit(words: Sequence[str]) -> int:
    from stepcredit.cli.audit import main

    return main(words)


def _warmstart(words: Sequence[str]) -> int:
    from stepcredit.cli.warmstart import main

    return main(words)


def _merge(words: Sequence[str]) -> int:
    from stepcredit.cli.merge import main

    return main(words)


def _convert(words: Sequence[str]) -> int:
    from stepcredit.cli.convert import main

    return main(words)


def _report(words: Sequence[str]) -> int:
    from stepcredit.cli.report import main

    return main(words)


def _show(words: Sequence[str]) -> int:
    from stepcredit.cli.show import main

    return main(words)


def _compare(words: Sequence[str]) -> int:
    from stepcredit.cli.compare import main

    return main(words)


def _algorithms(words: Sequence[str]) -> int:
    from stepcredit.cli.algorithms import main

    return main(words)


def _tasks(words: Sequence[str]) -> int:
    from stepcredit.cli.tasks import main

    return main(words)


def _prepare(words: Sequence[str]) -> int:
    from stepcredit.cli.prepare import main

    return main(words)


def _plan(words: Sequence[str]) -> int:
    from stepcredit.cli.plan import main

    return main(words)


def _config(words: Sequence[str]) -> int:
    from stepcredit.cli.config import main

    return main(words)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "eval": _eval,
    "sample": _sample,
    "score": _score,
    "credit": _credit,
    "audit": _audit,
    "report": _report,
    "show": _show,
    "compare": _compare,
    "prepare": _prepare,
    "plan": _plan,
    "config": _config,
    "algorithms": _algorithms,
    "tasks": _tasks,
    "merge": _merge,
    "convert": _convert,
    "warmstart": _warmstart,
}


SEVERAL = ("train", "prepare")  # commands that torchrun may start


def main(words: Sequence[str] | None = None) -> int:
    """Run a command.

    Exit codes: 0 done; 1 nothing was learnt (0 under torchrun, which takes any other for a crash), or too few gold
    answers accepted; 2 the input is wrong; 70 an unexpected exception, with its traceback; 130 interrupted.
    """
    words = list(sys.argv[1:] if words is None else words)
    code = _main(words)
    if code in (2, UNEXPECTED) and _processes() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # groups of processes would wait for each other
    return code


def _processes() -> int:
    """How many torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _say(error: Exception | str) -> None:
    which = f" in process {os.environ.get('RANK')} of {_processes()}" if _processes() > 1 else ""
    print(f"stepcredit: error{which}: {error}", file=sys.stderr)
    if _processes() > 1:  # for the summary that torchrun prints
        from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

        ErrorHandler().record_exception(error if isinstance(error, Exception) else UserError(error))


def _unexpected(error: Exception) -> int:
    traceback.print_exc()
    _say(error)
    return UNEXPECTED


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if words[0] == "--version":
        from stepcredit import __version__

        print(f"stepcredit {__version__}")
        return 0
    try:
        if words[0] not in COMMANDS:
            raise UserError(f"'{words[0]}' is not a command; {did_you_mean(words[0], COMMANDS)}")
        if words[0] not in SEVERAL and _processes() > 1:
            raise UserError(f"'{words[0]}' is for one process; start it without torchrun")
        from stepcredit.run.allocator import grow_segments

        grow_segments()
        return COMMANDS[words[0]](words[1:])
    except UserError as error:
        if not error.already_reported:
            _say(error)
        return 2
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = f"{error.filename}: " if error.filename else ""
            _say(f"{place}the disk is full; make room, then continue with --resume")
            return 2
        if error.filename is None:
            return _unexpected(error)
        _say(f"{error.filename}: {error.strerror}; choose another place or free it")
        return 2
    except Exception as error:
        return _unexpected(error)
    except KeyboardInterrupt:
        print("stepcredit: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
