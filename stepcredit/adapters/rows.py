"""Credit of padded rows: what a trainer that keeps its completions in `[B, T]` tensors calls.

Two prompts with two completions each, of at most three tokens; `nan` stands behind a completion that was not judged.

>>> import torch
>>> from stepcredit.adapters.rows import credit_rows
>>> mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
>>> credit_rows("rloo", groups=["a", "a", "b", "b"], mask=mask, rewards=torch.tensor([1.0, 0.0, 1.0, 1.0]))
tensor([[ 1.,  1.,  0.],
        [-1., -1., -1.],
        [ 0.,  0.,  0.],
        [ 0.,  0.,  0.]])
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepcredit.credit import CREDIT
from stepcredit.credit.base import CreditFunction, assign, check_options, needs_of
from stepcredit.errors import UserError
from stepcredit.forest import FINISH_CODE, Forest, Table
from stepcredit.forest.types import Problem
from stepcredit.imports import by_name

NO_COLUMNS: Mapping[str, Tensor] = {}


class RowCredit(NamedTuple):
    """Advantages of padded rows, [B, T] each.

    Attributes:
        process: the part of the advantages that a credit function of two parts calls its process part; None for others.
    """

    advantages: Tensor
    process: Tensor | None


def credit_rows(
    name: str,
    groups: Sequence[Hashable] | Tensor,
    mask: Tensor,
    rewards: Tensor,
    columns: Mapping[str, Tensor] = NO_COLUMNS,
    **options: Any,
) -> Tensor:
    """The advantage of every token of a batch of padded completions.

    Rows of one group need not stand together. Tokens that the mask leaves out, such as padding and what tools said, are
    in no sum, mean or length; they get 0.

    Args:
        name: of a credit function (`stepcredit.credit.CREDIT`), or `module.function` of your own.
        groups: [B] for each row what its prompt is called: any hashable values, or a tensor of integers.
        mask: [B, T] true for the tokens that the policy sampled.
        rewards: [B] outcome rewards; `nan` for completions that were not judged, which are in no baseline and get 0.
        columns: what the credit function reads beside the rewards, each [B, T]: `old_logprobs`, `ref_logprobs`,
            `token_rewards` and so on, by the names it declares.
        options: those of the credit function.

    Returns:
        [B, T] fp32, on the device of the mask, without a gradient.

    Raises:
        UserError: a shape, name, option or column does not fit, a reward is infinite, the credit is one of trees, or
            it takes rows out of the loss, which advantages cannot say.
    """
    return credit_parts(name, groups, mask, rewards, columns, options).advantages


def credit_parts(
    name: str,
    groups: Sequence[Hashable] | Tensor,
    mask: Tensor,
    rewards: Tensor,
    columns: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> RowCredit:
    """`credit_rows`, with the process part beside the advantages."""
    function = flat_credit(name, options)
    _check(groups, mask, rewards, columns)
    with mask.device:  # what credit functions make themselves is there as well
        forest, cells = _forest(groups, mask.detach().bool(), rewards.detach().to(mask.device).float(), columns)
        forest = assign(forest, name, function, options)
        if "kept" in forest.segment and not bool(forest.segment["kept"].all()):
            raise UserError(f"credit '{name}' takes completions out of the loss; rows of a trainer stay in it")
        zeros = torch.zeros(mask.numel())
        process = forest.token.get("process")
        return RowCredit(
            zeros.index_copy(0, cells, forest.token["advantages"]).view(mask.shape),
            None if process is None else zeros.index_copy(0, cells, process).view(mask.shape),
        )


def flat_credit(name: str, options: Mapping[str, Any]) -> CreditFunction:
    """The credit function of a name or dotted path.

    Raises:
        UserError: there is none, it does not take these options, or it is one of trees.
    """
    function = by_name("credit", name, CREDIT)
    if needs_of(function).forests == "tree":
        raise UserError(
            f"credit '{name}' is one of trees, and rows of a trainer have none; 'stepcredit train' grows them"
        )
    check_options(name, function, options)
    return function


def _check(groups: Sequence[Hashable] | Tensor, mask: Tensor, rewards: Tensor, columns: Mapping[str, Tensor]) -> None:
    if mask.dim() != 2:
        raise UserError(f"mask has shape {tuple(mask.shape)}; expected [B, T], a row for each completion")
    if rewards.shape != mask.shape[:1]:
        raise UserError(f"rewards has shape {tuple(rewards.shape)}; expected [{len(mask)}], one for each row of mask")
    if len(groups) != len(mask):
        raise UserError(f"groups has {len(groups)} values; expected {len(mask)}, one for each row of mask")
    if bool(rewards.isinf().any()):
        raise UserError(f"rewards[{int(rewards.isinf().nonzero()[0])}] is infinite")
    for column, values in columns.items():
        if values.shape != mask.shape:
            raise UserError(
                f"columns['{column}'] has shape {tuple(values.shape)}; expected that of mask, {tuple(mask.shape)}"
            )


def _forest(
    groups: Sequence[Hashable] | Tensor, mask: Tensor, rewards: Tensor, columns: Mapping[str, Tensor]
) -> tuple[Forest, Tensor]:
    """A flat forest of the rows, one group after the other, and for each of its tokens the cell of the mask.

    Token ids are 0 where `columns` has no `token_ids`, and prompts are empty: no credit function reads them.
    """
    names, group_of = _numbered(groups)
    order = group_of.sort(stable=True).indices
    length = mask.sum(1)
    cells = mask.flatten().nonzero().squeeze(1)
    if not bool((order[1:] > order[:-1]).all()):  # rows of a group do not stand together
        cells = _rows_of(cells, length, order)
    length, tree = length[order], group_of[order]
    start = length.cumsum(0) - length
    token_row = torch.arange(len(mask)).repeat_interleave(length)
    none = torch.zeros(len(names), dtype=torch.long)
    reward = rewards[order]
    segments = Table(
        len(mask),
        {
            "tree": tree,
            "parent": torch.full_like(tree, -1),
            "depth": torch.zeros_like(tree),
            "start": start,
            "length": length,
            "is_leaf": torch.ones_like(tree, dtype=torch.bool),
            "sampled": torch.ones_like(tree, dtype=torch.bool),
            "finish": torch.full_like(tree, FINISH_CODE["stop"]),
            "reward": reward.nan_to_num(0.0),
            "has_reward": ~reward.isnan(),
            "mask": torch.ones_like(tree, dtype=torch.bool),
        },
    )
    tokens = {
        "token_ids": torch.zeros_like(token_row),
        "segment": token_row,
        "position": torch.arange(len(token_row)) - start.index_select(0, token_row),
        **{
            column: values.detach().to(mask.device).reshape(-1).index_select(0, cells)
            for column, values in columns.items()
        },
    }
    forest = Forest(
        problems=tuple(Problem(question="", answer=None, id=str(each)) for each in names),
        prompt_ids=torch.zeros(0, dtype=torch.long),
        tree=Table(len(names), {"prompt_start": none, "prompt_length": none}),
        segment=segments,
        token=Table(len(token_row), tokens),
        details=({"rewards": {}, "extra": {}},) * len(mask),
        tree_extra=({},) * len(names),
    )
    return forest, cells


def _rows_of(values: Tensor, length: Tensor, order: Tensor) -> Tensor:
    """Rows of values, one after the other, in another order.

    Args:
        length: of each row.
    """
    start = (length.cumsum(0) - length)[order]
    length = length[order]
    behind = start - (length.cumsum(0) - length)  # where a row's values stand, less where they shall
    return values[torch.arange(len(values)) + behind.repeat_interleave(length)]


def _numbered(groups: Sequence[Hashable] | Tensor) -> tuple[list[Hashable], Tensor]:
    """The names of the groups in the order in which they come first, and the number of each row's."""
    values = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    numbers: dict[Hashable, int] = {}
    group_of = [numbers.setdefault(value, len(numbers)) for value in values]
    return list(numbers), torch.tensor(group_of, dtype=torch.long)
