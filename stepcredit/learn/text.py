"""Text that the policy goes on learning beside its rollouts: the pretraining loss of InstructGPT and PPO-max."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import TokenScores
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.learn.options import TextOptions
from stepcredit.policy.forward import Policy
from stepcredit.policy.limits import check_positions
from stepcredit.seeds import TEXT, generator, mixed

log = logging.getLogger("stepcredit")


class PretrainingText:
    """Adds coef * (mean over tokens of -log pi) of some rows of a text to each optimiser step (InstructGPT, arXiv
    2203.02155; PPO-max, arXiv 2307.04964).

    The text is cut into rows of `length` tokens, the last of which may be shorter; a step takes as many rows as hold
    `tokens`, in an order that each pass over the text shuffles anew. The first token of a row is predicted from
    nothing, so it is context alone. Log-probabilities are at temperature 1.

    Args:
        ids: of the whole text.
        seed: of the run.

    Attributes:
        position: rows taken so far.

    Raises:
        UserError: there are fewer than two tokens.
    """

    def __init__(self, ids: Sequence[int], given: TextOptions, seed: int) -> None:
        if len(ids) < 2:
            raise UserError(
                f"ptx.data: '{given.data}' has {len(ids)} tokens; the next ones are learnt, so give it more"
            )
        rows = [list(ids[start : start + given.length]) for start in range(0, len(ids), given.length)]
        self.rows = [row for row in rows if len(row) > 1]
        self.coef, self.seed, self.data = given.coef, seed, given.data
        self.per_step = min(len(self.rows), max(1, given.tokens // given.length))
        self.position = 0
        self.fingerprint = hashlib.sha256(torch.tensor(ids, dtype=torch.int64).numpy().tobytes()).hexdigest()

    def next(self) -> Forest:
        """The rows of the next step, each token with its weight."""
        numbers = range(self.position, self.position + self.per_step)
        self.position += self.per_step
        rows = [self._row(number) for number in numbers]
        trees = [Tree(Problem(id=f"ptx {number}"), row[:1], [Segment(row[1:])]) for number, row in enumerate(rows)]
        forest = Forest.from_trees(trees)
        return forest.with_token(weights=torch.full((forest.num_tokens,), self.coef / forest.num_tokens))

    def _row(self, number: int) -> list[int]:
        epoch, place = divmod(number, len(self.rows))
        order = generator(mixed(self.seed, TEXT, epoch)).permutation(len(self.rows))
        return self.rows[int(order[place])]

    def loss(self, part: Forest, call: Callable[..., TokenScores]) -> tuple[Tensor, Tensor]:
        """Of a part of a step: what is added to the step's loss, and the same without coefficient and gradient."""
        weights = part.token["weights"] * part.token["owned"]
        logprobs = call(part.with_token(weights=weights, owned=weights != 0), 1.0, False).logprobs
        weights = weights.to(logprobs.device)
        loss = -(weights * torch.where(weights > 0, logprobs, 0.0)).sum()
        return loss, loss.detach() / self.coef

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any], changed_data: str) -> None:
        """The inverse of `state_dict`.

        Raises:
            UserError: the text is another, and `changed_data` (checkpoint.changed_data) is "stop".
        """
        self.position = state["position"]
        if state["fingerprint"] == self.fingerprint:
            return
        what = f"--resume: the text of ptx.data '{self.data}' is not the one that the run began with"
        if changed_data == "stop":
            raise UserError(f"{what}; put it back, or go on all the same with --checkpoint.changed-data continue")
        log.warning("%s", what)


def load_text(given: TextOptions, policy: Policy, seed: int) -> PretrainingText | None:
    """The text that the options name; None where they name none.

    Raises:
        UserError: there is no such file, it is no text or has hardly any, or rows are too long for the model.
    """
    if given.data is None:
        return None
    text = read_text(given.data)
    check_positions(policy.positions, given.length, f"ptx.length: rows of {given.length} tokens")
    ids = policy.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return PretrainingText(ids, given, seed)


def read_text(data: str) -> str:
    """The text of a file.

    Raises:
        UserError: there is no such file, it is empty or not text.
    """
    path = Path(data)
    if not path.is_file():
        raise UserError(f"ptx.data: '{data}' is no file; give a text file")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"ptx.data: '{data}' cannot be read as text ({error})") from error
    if not text.strip():
        raise UserError(f"ptx.data: '{data}' is empty; give a text file, or leave ptx.data out")
    return text
