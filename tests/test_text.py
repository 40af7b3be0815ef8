"""Text beside the rollouts: its gradient, order, state, metric, and what is refused."""

import json
import shutil

import pytest
import torch
from builders import objective_of, random_forest
from test_train import difference, metrics, train
from tiny_models import fresh

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.errors import UserError
from stepcredit.learn.learner import Learner
from stepcredit.learn.options import AdamWOptions, OptimOptions, TextOptions
from stepcredit.learn.placement import UNSHARDED
from stepcredit.learn.text import PretrainingText, load_text
from stepcredit.learn.update import PolicyUpdate
from stepcredit.policy.loading import load_policy
from stepcredit.run.build import build_parts

IDS = [(7 * number) % 50 for number in range(40)]
WORDS = "Cat = 22 . Una = Cat - 9 . Leo = Una + 2 . Hal = Cat + 2 . Ray = Leo + 4 .\n" * 40


def text(**options) -> PretrainingText:
    return PretrainingText(IDS, TextOptions(**{"data": "x", "length": 8, "tokens": 16} | options), seed=3)


def gradient_of(beside: PretrainingText | None, max_tokens: int = 4096) -> tuple[torch.Tensor, dict]:
    """Of one optimiser step, that is not taken, and its metrics."""
    policy = fresh("qwen3")
    learner = Learner(policy, UNSHARDED, AdamWOptions(), max_tokens)
    update = PolicyUpdate(learner, objective_of(), OptimOptions(), 1.0, 0, beside)
    generator = torch.Generator().manual_seed(0)
    forest = random_forest(3)
    step = update.weighted(forest.with_token(advantages=torch.randn(forest.num_tokens, generator=generator)))
    _, seen = update._accumulate(step)
    return torch.cat([value.grad.flatten() for value in learner.trained]), seen


def by_hand(rows: list[list[int]]) -> tuple[torch.Tensor, float]:
    """Gradient and value of the mean of -log pi over all tokens but the first of each row, by the model alone."""
    policy = fresh("qwen3")
    losses = []
    for row in rows:
        logits = policy.model(torch.tensor([row])).logits[0, :-1].float()
        losses.append(-torch.log_softmax(logits, -1).gather(1, torch.tensor(row[1:])[:, None])[:, 0])
    loss = torch.cat(losses).mean()
    loss.backward()
    trained = [value for value in policy.parameters() if value.requires_grad]
    gradient = [torch.zeros_like(value) if value.grad is None else value.grad for value in trained]
    return torch.cat([value.flatten() for value in gradient]), float(loss.detach())


@pytest.mark.parametrize("max_tokens", [4096, 12])
@pytest.mark.parametrize("coef", [1.0, 0.25])
def test_its_gradient_is_added_to_that_of_the_batch(coef, max_tokens):
    """By the model alone; however a step is cut into micro-batches, each of which has a forward of its own."""
    rows = text(coef=coef)
    expected, loss = by_hand([rows._row(number) for number in range(2)])
    with_text, seen = gradient_of(rows, max_tokens)
    without, nothing = gradient_of(None)
    torch.testing.assert_close(with_text - without, coef * expected, atol=1e-5, rtol=1e-3)
    assert seen["ptx/loss"] == pytest.approx(loss, rel=1e-5) and nothing == {}
    assert float(expected.norm()) > 0.1


def test_every_row_comes_once_in_each_pass_in_an_order_of_the_seed():
    rows = text()
    forests = [rows.next() for _ in range(5)]  # of 5 rows, two a step: two passes
    starts = [each for forest in forests for each in forest.prompt_ids.tolist()]
    assert sorted(starts[:5]) == sorted(starts[5:]) == sorted(IDS[::8]) and starts[:5] != starts[5:]
    other = PretrainingText(IDS, TextOptions(data="x", length=8, tokens=16), seed=4)
    assert [row for _ in range(5) for row in other.next().prompt_ids.tolist()] != starts
    for forest in forests:
        torch.testing.assert_close(forest.token["weights"].sum(), torch.tensor(1.0))
    again = text()
    again.load_state_dict({"position": 4, "fingerprint": again.fingerprint}, "stop")
    assert again.next().prompt_ids.tolist() == starts[4:6]


def test_a_rest_of_one_token_is_no_row():
    assert [len(row) for row in PretrainingText(IDS[:17], TextOptions(data="x", length=8), 0).rows] == [8, 8]
    assert [len(row) for row in PretrainingText(IDS[:18], TextOptions(data="x", length=8), 0).rows] == [8, 8, 2]


def test_another_text_is_another_run(caplog):
    rows = text()
    state = rows.state_dict() | {"fingerprint": "another"}
    with pytest.raises(UserError, match=r"checkpoint\.changed-data continue"):
        rows.load_state_dict(state, "stop")
    rows.load_state_dict(state, "continue")
    assert "not the one" in caplog.text


@pytest.mark.parametrize(
    "content, piece",
    [
        (None, "is no file"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b"Cat", "has 1 tokens"),
    ],
    ids=str,
)
def test_files_that_do_not_serve_are_named(content, piece, tmp_path):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=piece) as error:
        load_text(TextOptions(data=str(file)), load_policy("embedded", "cpu"), 0)
    assert str(file) in str(error.value)


def test_options_without_a_text_are_refused():
    with pytest.raises(UserError, match=r"ptx\.data"):
        build_parts(resolve({"ptx": {"coef": 2.0}}))
    assert load_text(TextOptions(), load_policy("embedded", "cpu"), 0) is None


def test_a_run_with_text_goes_on_bit_for_bit(tmp_path):
    """It learns the text, and a run that was killed has its place in it."""
    (tmp_path / "text.txt").write_text(WORDS)
    straight, killed, without = (tmp_path / name for name in ("straight", "killed", "without"))
    options = {"ptx.data": tmp_path / "text.txt", "ptx.length": 32, "ptx.tokens": 64, "optim.schedule": "constant"}
    options |= {"iterations": 4, "save-every": 2, "checkpoint.keep": 9, "optim.num-minibatches": 2}
    assert train(straight, **options) in (0, 1)
    rows = metrics(straight)[1:]
    losses = [row.get("ptx/loss") for row in rows]  # an iteration whose steps are skipped takes none of the text
    assert [loss is None for loss in losses] == [row["optim/skipped"] == 1 for row in rows]
    learnt = [loss for loss in losses if loss is not None]
    assert len(learnt) > 2 and learnt[-1] < learnt[0]
    shutil.copytree(straight, killed)
    shutil.rmtree(killed / "checkpoints" / "000004")
    (killed / "latest").write_text("checkpoints/000002\n")
    state = json.loads((killed / "checkpoints" / "000002" / "trainer_state" / "state.json").read_text())
    assert state["text"]["position"] > 0
    assert main(["train", "--resume", "auto", "--run-dir", str(killed)]) in (0, 1)
    assert difference(straight, killed, 4) == 0.0
    assert [row.get("ptx/loss") for row in metrics(killed)[1:]] == losses
    assert train(without, **{name: value for name, value in options.items() if "ptx" not in name}) in (0, 1)
    assert difference(straight, without, 4) > 0 and "ptx/loss" not in metrics(without)[-1]
