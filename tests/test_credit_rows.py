"""Credit of padded rows equals that of the same completions as trees."""

import doctest
from pathlib import Path

import pytest
import torch

from stepcredit.adapters import rows
from stepcredit.adapters.rows import credit_parts, credit_rows
from stepcredit.credit import CREDIT, CreditParts, assign, credit
from stepcredit.credit.base import needs_of
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree

FLAT = [name for name, function in CREDIT.items() if needs_of(function).forests == "flat"]
B, T = 12, 9


def batch(seed: int = 0, empty: bool = False):
    """Groups that do not stand together, holes in the mask, an unjudged completion, dense rewards."""
    generator = torch.Generator().manual_seed(seed)
    groups = [["a", "b", "c"][number] for number in torch.randint(3, (B,), generator=generator).tolist()]
    length = torch.randint(1, T + 1, (B,), generator=generator)
    mask = torch.arange(T) < length[:, None]
    mask[2, 1:3] = mask[5, 0] = False
    mask[2, 4], mask[5, 3] = True, True
    if empty:
        mask[7] = False
    rewards = torch.randint(3, (B,), generator=generator) / 2
    rewards[4] = torch.nan
    names = {column for name in FLAT for column in needs_of(CREDIT[name]).columns} | {"token_rewards"}
    columns = {column: torch.randn(B, T, generator=generator) for column in sorted(names)}
    return groups, mask, rewards, columns


def as_trees(name, groups, mask, rewards, columns):
    """The same by the way of trees, one row at a time."""
    expected = torch.zeros(B, T)
    trees, places = [], []
    for group in dict.fromkeys(groups):
        segments = []
        for row in (row for row in range(B) if groups[row] == group):
            at = mask[row].nonzero().squeeze(1)
            values = {column: each[row, at].tolist() for column, each in columns.items()}
            reward = None if rewards[row].isnan() else float(rewards[row])
            segments.append(Segment([1] * len(at), reward=reward, finish="stop", columns=values))
            places += [(row, int(place)) for place in at]
        trees.append(Tree(Problem(id=group), [1], segments))
    forest = assign(Forest.from_trees(trees), name, CREDIT[name], {})
    for (row, place), value in zip(places, forest.token["advantages"].tolist(), strict=True):
        expected[row, place] = value
    return expected


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_the_completions_of_flat_trees(name, seed):
    given = batch(seed)
    assert torch.equal(credit_rows(name, *given), as_trees(name, *given))


@pytest.mark.parametrize("name", FLAT)
def test_order_of_rows_and_names_of_groups_do_not_matter(name):
    groups, mask, rewards, columns = batch()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    numbers = torch.tensor([{"a": 7, "b": -1, "c": 0}[group] for group in groups])
    moved = credit_rows(name, numbers[order], mask[order], rewards[order], {k: v[order] for k, v in columns.items()})
    torch.testing.assert_close(moved, credit_rows(name, groups, mask, rewards, columns)[order], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FLAT)
def test_a_wider_padding_adds_zeros(name):
    groups, mask, rewards, columns = batch()
    wide = [torch.nn.functional.pad(each, (0, 3)) for each in (mask, *columns.values())]
    out = credit_rows(name, groups, wide[0], rewards, dict(zip(columns, wide[1:], strict=True)))
    assert torch.equal(out[:, :T], credit_rows(name, groups, mask, rewards, columns)) and not out[:, T:].any()


@pytest.mark.parametrize("name", FLAT)
def test_a_row_without_tokens_gets_nothing(name):
    groups, mask, rewards, columns = batch(empty=True)
    out = credit_rows(name, groups, mask, rewards, columns)
    assert out.isfinite().all() and not out[7].any() and out.any()


def test_a_row_without_tokens_counts_in_the_baseline():
    mask = torch.tensor([[1, 1], [0, 0]])
    assert credit_rows("dr_grpo", [0, 0], mask, torch.tensor([1.0, 0.0])).tolist() == [[0.5, 0.5], [0.0, 0.0]]


def test_what_is_given_stays_as_it_is_and_has_no_gradient():
    groups, mask, rewards, columns = batch()
    columns["old_logprobs"].requires_grad_()
    before = {name: each.clone() for name, each in columns.items()}
    assert not credit_rows("spro", groups, mask, rewards, columns).requires_grad
    assert all(torch.equal(before[name], columns[name]) for name in columns)


def test_the_example_holds():
    assert doctest.testmod(rows).failed == 0


def test_the_example_of_the_page_runs(capsys):
    page = (Path(__file__).parents[1] / "docs" / "rows.md").read_text()
    block = page.split("```python\n")[1].partition("```")[0]
    exec(block, {})
    assert capsys.readouterr().out == "tensor" + block.rpartition("# tensor")[2].replace("\n# ", "\n")


def test_the_process_part_is_beside_the_advantages():
    groups, mask, rewards, columns = batch()
    parts = credit_parts("spro", groups, mask, rewards, columns, {"beta": 1.0})
    outcome = credit_rows("grpo", groups, mask, rewards, columns)
    assert parts.process.any() and torch.equal(parts.advantages, outcome + parts.process)
    assert credit_parts("grpo", groups, mask, rewards, columns, {}).process is None


@credit()
def without_the_first(forest):
    kept = torch.arange(forest.num_segments) > 0
    return CreditParts(torch.zeros(forest.num_tokens), kept=kept)


def test_a_credit_that_takes_rows_out_of_the_loss_is_refused():
    with pytest.raises(UserError, match="takes completions out of the loss"):
        credit_rows(f"{__file__}:without_the_first", [0, 0], torch.ones(2, 2), torch.zeros(2))


WRONG = {
    "nope": (dict(name="nope"), "'nope'"),
    "a tree credit": (dict(name="treerpo"), "one of trees"),
    "an option": (dict(name="rloo", beta=1.0), "beta"),
    "rewards": (dict(rewards=torch.zeros(3)), r"rewards has shape \(3,\); expected \[12\]"),
    "groups": (dict(groups=["a"]), "groups has 1 values; expected 12"),
    "mask": (dict(mask=torch.ones(12, dtype=torch.bool)), "mask has shape"),
    "column": (dict(columns={"old_logprobs": torch.zeros(12, 2)}), r"columns\['old_logprobs'\] has shape"),
    "absent": (dict(name="spro", columns={}), "needs the column 'old_logprobs'"),
    "infinite": (dict(rewards=torch.full((12,), torch.inf)), r"rewards\[0\] is infinite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_an_error(case):
    groups, mask, rewards, columns = batch()
    given, message = WRONG[case]
    call = dict(name="rloo", groups=groups, mask=mask, rewards=rewards, columns=columns) | given
    with pytest.raises(UserError, match=message):
        credit_rows(**call)
