"""`stepcredit`: the command line. Heavy imports wait until a command really runs."""

import errno
import sys
from collections.abc import Callable, Sequence

from stepcredit.errors import UserError, did_you_mean

HELP = """\
stepcredit: reinforcement learning of LLM reasoning with credit for every step

  stepcredit train      train a model on verifiable rewards
  stepcredit eval       accuracy of a model on held-out problems
  stepcredit sample     look at completions and their rewards
  stepcredit score      check a verifier on gold answers, grade a column or saved rollouts
  stepcredit credit     compute advantages of saved rollouts, without a model
  stepcredit warmstart  build the embedded base model anew

Examples
  stepcredit train                                       the embedded model learns on this machine, no download
  stepcredit train --algorithm spro --iterations 50
  stepcredit train --model my-model --data problems.jsonl --learning-rate 1e-6
  stepcredit credit --in rollouts.jsonl --out scored.jsonl --credit.name opo

'stepcredit COMMAND --help' shows the options of a command."""


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


def _warmstart(words: Sequence[str]) -> int:
    from stepcredit.cli.warmstart import main

    return main(words)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "eval": _eval,
    "sample": _sample,
    "score": _score,
    "credit": _credit,
    "warmstart": _warmstart,
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command.

    Exit codes: 0 done, 1 nothing was learnt or too few gold answers accepted, 2 the input is wrong, 130 interrupted.
    """
    words = list(sys.argv[1:] if words is None else words)
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
        return COMMANDS[words[0]](words[1:])
    except UserError as error:
        print(f"stepcredit: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = f"{error.filename}: " if error.filename else ""
            print(
                f"stepcredit: error: {place}the disk is full; make room, then continue with --resume", file=sys.stderr
            )
            return 2
        if error.filename is None:
            raise
        print(
            f"stepcredit: error: {error.filename}: {error.strerror}; choose another place or free it", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("stepcredit: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
