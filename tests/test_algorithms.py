"""`stepcredit algorithms`: what is said of an algorithm is what its parts do, and README has it."""

import json
from pathlib import Path

import pytest
import torch

from stepcredit.cli.algorithms import counted, main, needs
from stepcredit.cli.main import main as stepcredit
from stepcredit.config import read_yaml, resolve
from stepcredit.config.algorithms import ALGORITHMS, Algorithm
from stepcredit.credit.choose import build_credit
from stepcredit.estimators.base import Passes
from stepcredit.estimators.reads import observers_of
from stepcredit.plan.algorithms import facts_of
from stepcredit.plan.memory import ALWAYS, GIB, STEP, estimate_memory
from stepcredit.policy.forward import Policy
from stepcredit.run.trainer import Trainer

README = Path(__file__).parents[1] / "README.md"


def said(capsys, *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------------- what is said


def test_readme_has_the_table_that_the_program_makes(capsys):
    """Make it anew with `stepcredit algorithms --markdown`."""
    assert said(capsys, "--markdown") in README.read_text(encoding="utf-8")


def test_the_table_has_every_algorithm(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    shown = said(capsys)
    assert [name for name in ALGORITHMS if not any(line.startswith(f"{name} ") for line in shown.splitlines())] == []
    assert "2-3 + 1" in shown and "trees of up to 512 completions" in shown


def test_one_algorithm_has_its_formula_paper_and_config(capsys):
    shown = said(capsys, "spro", "opo")
    assert shown.index("spro:") < shown.index("opo:")
    for piece in (
        "arXiv 2507.01551",
        "A_{i,t} = (r_i - mean) / (std + 1e-6) + MSA_{i,t}: GRPO's outcome part and a process part\n",
        "old_logprobs, ref_logprobs",
        "policy 1 + 1, old_logprobs 0-1 + 0, ref_logprobs 1 + 0",
        "uniform: keep",
        "-A log pi",
    ):
        assert piece in shown


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_config_it_amounts_to_is_the_algorithm(name, capsys, tmp_path):
    """As a file it resolves to the same, but that defaults of credit and loss are written out."""
    written = said(capsys, name).partition("  config\n")[2]
    (tmp_path / "run.yaml").write_text("model: my-model\n" + "\n".join(line[4:] for line in written.splitlines()))
    found, wanted = resolve(read_yaml(str(tmp_path / "run.yaml"))), resolve({"algorithm": name, "model": "my-model"})
    for part in ("credit", "loss"):
        given, bare = getattr(found, part), getattr(wanted, part)
        assert given.name == bare.name and bare.options.items() <= given.options.items()
    build_credit(found.credit)
    assert found.model_dump(exclude={"credit", "loss"}) == wanted.model_dump(exclude={"credit", "loss"})


def test_json_has_the_same(capsys):
    rows = {row["name"]: row for row in json.loads(said(capsys, "--json"))}
    assert list(rows) == list(ALGORITHMS)
    prime = rows["prime"]
    assert prime["models"] == [{"name": "reference", "learns": False}, {"name": "reward model", "learns": True}]
    assert prime["passes"]["all"] == {"forward": 3, "backward": 2, "spared": 0}
    assert prime["columns"] == ["prm_logprobs", "ref_logprobs"] and prime["bytes_per_weight"] == 32
    assert [row["name"] for row in json.loads(said(capsys, "opo", "--json"))] == ["opo"]


@pytest.mark.parametrize(
    "words, pieces",
    [
        (["sprr"], ["'sprr'", "did you mean 'spro'"]),
        (["grpo", "GRPO"], ["'GRPO'", "did you mean"]),
        (["--yaml"], ["--yaml", "json, markdown"]),
        (["--json", "--markdown"], ["give one"]),
    ],
    ids=str,
)
def test_bad_words_are_named(words, pieces, capsys):
    assert stepcredit(["algorithms", *words]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert [piece for piece in pieces if piece not in error] == [], error


# ---------------------------------------------------------------------- that it is so


def test_needs_and_costs_follow_from_the_parts(monkeypatch):
    """A row that sums credits, with a KL term and trees: nobody wrote down what it needs."""
    terms = [{"name": "rloo"}, {"name": "spro", "part": "process"}, {"name": "prime", "part": "process", "weight": 0.5}]
    monkeypatch.setitem(ALGORITHMS, "mine", Algorithm("sum", "0000.00000", "x", credit_options={"sum": terms}))
    facts = facts_of("mine")
    assert facts.columns == ("old_logprobs", "prm_logprobs", "ref_logprobs")
    assert needs(facts) == ["reference", "reward model, learnt"]
    assert counted(facts.total) == "3-4 + 2" and facts.bytes_per_weight == 32
    assert facts.advantage.startswith("rloo + spro.process + 0.5 prime.process: A_i = r_i - mean of the other returns")
    row = Algorithm("spo_tree", "textbook", "x", growth={"name": "tree", "depth": 2}, objective={"kl": {"coef": 0.1}})
    monkeypatch.setitem(ALGORITHMS, "mine", row)
    assert needs(facts_of("mine")) == ["trees of up to 64 completions", "reference"]
    monkeypatch.setitem(ALGORITHMS, "mine", Algorithm("grpo", "textbook", "x", data="gold steps"))
    assert needs(facts_of("mine")) == ["gold steps"]


@pytest.mark.parametrize("name", ["grpo", "spro", "prime"])
def test_bytes_are_those_of_the_memory_plan(name):
    """Of a whole model: what is there all the time and the gradients, over its weights."""
    config = resolve({"algorithm": name, "model": "none", "train": {"dtype": "float32"}})  # without the recipe
    config = config.model_copy(update={"model": "embedded"})
    plan = estimate_memory(config, 1, "ddp", 80 * GIB)
    weights = next(part.bytes for part in plan.parts if part.name == "policy: weights, fp32") / 4
    held = sum(part.bytes for part in plan.parts if part.when in (ALWAYS, STEP))
    assert held / weights == facts_of(name).bytes_per_weight


RUNS = {
    "grpo": "--algorithm grpo",
    "epochs": "--algorithm grpo --optim.num-epochs 2 --optim.num-minibatches 2",
    "spro": "--algorithm spro",
    "prime": "--algorithm prime --prm.reference start",
    "own reference": "--algorithm prime --prm.reference policy --estimators.old-logprobs forward",
    "before": "--algorithm prime --prm.reference start --prm.update before --prm.num-minibatches 2",
    "frozen": "--algorithm prime --prm.reference start --prm.update none",
    "kl": "--algorithm rloo --objective.kl.coef 0.01",
    "adapters": "--algorithm spro --lora.rank 2",
    "penalty": "--algorithm reinforce_pp --objective.kl.coef 0.01 --objective.kl.estimator k1",
    "sampler's": "--algorithm spro --estimators.old-logprobs sampler",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_passes_are_those_that_a_run_makes(kind, monkeypatch, tmp_path):
    """Tokens that models score in the first iteration, with and without gradient, over those sampled."""
    scored = {True: 0, False: 0}
    forward, begin = Policy.forward, Trainer.begin
    configs = []

    def counting(self, part, *more, **named):
        if "owned" in part.token:  # not a forest that the scoring form is tried on
            scored[torch.is_grad_enabled()] += int(part.token["owned"].sum())
        return forward(self, part, *more, **named)

    def starting(self):
        scored.update({True: 0, False: 0})
        configs.append(self.config)
        return begin(self)

    monkeypatch.setattr(Policy, "forward", counting)
    monkeypatch.setattr(Trainer, "begin", starting)
    small = "--train.problems-per-iteration 4 --group-size 4 --num-problems 2 --max-new-tokens 24 --iterations 1"
    everything = "--objective.entropy-coef 1e-6 --device cpu"  # tokens without advantage are computed, too
    words = [*RUNS[kind].split(), *small.split(), *everything.split(), "--run-dir", str(tmp_path / "run")]
    assert stepcredit(["train", *words]) in (0, 1)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    (config,) = configs
    epochs = config.optim.num_epochs
    each = [Passes(epochs, epochs), *observers_of(config).passes(config).values()]
    spared = 1 / 4 if kind == "sampler's" else 0  # some trees are scored to compare
    sampled = last["tokens/sampled"]
    assert scored[True] == sampled * sum(one.backward for one in each)
    without = sum(one.forward - one.backward for one in each)
    assert 0 <= scored[False] / sampled - without <= 2 * spared
