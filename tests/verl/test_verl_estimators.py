"""The credit functions as estimators of verl, through its own registry and `compute_advantage`: `make test-verl`."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if "verl.trainer.ppo.v1.utils" not in sys.modules:  # conftest.py tried
    pytest.skip("make test-verl sets up verl", allow_module_level=True)

import numpy as np
import verl
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo import core_algos, ray_trainer
from verl.trainer.ppo.v1 import utils

import stepcredit
from stepcredit.adapters import verl as adapter
from stepcredit.adapters.rows import credit_rows
from stepcredit.credit import CREDIT, credit
from stepcredit.credit.base import needs_of
from stepcredit.errors import UserError

ROOT = Path(stepcredit.__file__).parents[1]
B, T = 8, 7
LENGTHS = [7, 3, 5, 2, 6, 4, 7, 1]
READY = [
    name
    for name, function in CREDIT.items()
    if needs_of(function).forests == "flat" and set(needs_of(function).columns) <= {*adapter.COLUMNS, "token_rewards"}
]


def data(dense: bool = False, **columns: torch.Tensor) -> DataProto:
    """Two prompts with four completions each, rows of both mixed; the score stands on the last token."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    rewards = torch.zeros(B, T)
    rewards[torch.arange(B), torch.tensor(LENGTHS) - 1] = torch.tensor([1.0, 0, 1, 0, 0, 0, 1, 1])
    if dense:
        rewards += torch.randint(4, (B, T), generator=generator) / 4 * mask
    batch = {
        "token_level_rewards": rewards,
        "response_mask": mask,
        "old_log_probs": torch.randn(B, T, generator=generator) * mask,
        "ref_log_prob": torch.randn(B, T, generator=generator) * mask,
    }
    given = DataProto(batch=TensorDict(batch | columns, batch_size=B))
    given.non_tensor_batch["uid"] = np.array([f"u{row % 2}" for row in range(B)], dtype=object)
    return given


def through_verl(given: DataProto, estimator: str, **options) -> torch.Tensor:
    """The way of V1's trainer: the key of a row, and verl's algorithm section as its config."""
    config = OmegaConf.create({"gamma": 1.0, "stepcredit": options} if options else {"gamma": 1.0})
    keys = [f"{uid}_{row}_0" for row, uid in enumerate(given.non_tensor_batch["uid"])]
    done = utils.compute_advantage_for_multi_trajectories(
        given, batch_keys=keys, adv_estimator=estimator, config=config
    )
    assert torch.equal(done.batch["returns"], done.batch["advantages"])
    return done.batch["advantages"]


def by_rows(given: DataProto, name: str, more: dict | None = None, **options) -> torch.Tensor:
    batch, mask = given.batch, given.batch["response_mask"].bool()
    last = torch.nn.functional.one_hot(mask.sum(1) - 1, T).bool()
    outcome = batch["token_level_rewards"][last]
    columns = {
        "old_logprobs": batch["old_log_probs"],
        "ref_logprobs": batch["ref_log_prob"],
        "token_rewards": batch["token_level_rewards"].masked_fill(last, 0.0),
        **(more or {}),
    }
    return credit_rows(name, list(given.non_tensor_batch["uid"]), mask, outcome, columns, **options)


def test_verl_loaded_them_by_itself():
    """`import verl` alone, in a fresh process, with the package installed."""
    code = "import verl; from verl.trainer.ppo.core_algos import get_adv_estimator_fn as f\n"
    code += "print(f('stepcredit_opo').__name__)"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=clean, check=True)
    assert out.stdout == "stepcredit_opo\n"
    assert verl.__version__.startswith(f"{adapter.TESTED}.")


@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize("dense", [False, True], ids=["outcome", "dense"])
def test_an_estimator_gives_the_credit_of_rows(name, dense):
    given = data(dense)
    got = through_verl(given, f"stepcredit_{name}")
    assert torch.equal(got, by_rows(given, name)) and got.any()


def test_options_stand_under_one_key():
    given = data()
    got = through_verl(given, "stepcredit_spro", beta=0.5, uniform="drop")
    assert torch.equal(got, by_rows(given, "spro", beta=0.5, uniform="drop"))
    assert not torch.equal(got, by_rows(given, "spro"))


@pytest.mark.parametrize("name", ["opo", "rloo", "grpo"])
@pytest.mark.parametrize("dense", [False, True], ids=["outcome", "dense"])
def test_they_are_those_of_verl(name, dense):
    torch.testing.assert_close(
        through_verl(data(dense), f"stepcredit_{name}"), through_verl(data(dense), name), atol=1e-6, rtol=1e-5
    )


def test_dr_grpo_is_grpo_of_verl_without_the_std():
    keys = [f"{uid}_{row}_0" for row, uid in enumerate(data().non_tensor_batch["uid"])]
    theirs = utils.compute_advantage_for_multi_trajectories(
        data(), batch_keys=keys, adv_estimator="grpo", norm_adv_by_std_in_grpo=False
    )
    torch.testing.assert_close(through_verl(data(), "stepcredit_dr_grpo"), theirs.batch["advantages"])


def test_spro_by_hand():
    given = data()
    batch, mask = given.batch, given.batch["response_mask"].float()
    ratio = 0.05 * ((batch["old_log_probs"] - batch["ref_log_prob"]) * mask).cumsum(1)
    wanted = torch.zeros(B, T)
    for group in range(2):
        rows = slice(group, None, 2)
        inside, returns = mask[rows], batch["token_level_rewards"][rows].sum(1)
        mean = (ratio[rows] * inside).sum(0) / inside.sum(0).clamp(min=1)
        score = (returns - returns.mean()) / (returns.std() + 1e-6)
        wanted[rows] = (score[:, None] + ratio[rows] - mean) * inside
    torch.testing.assert_close(through_verl(given, "stepcredit_spro"), wanted, atol=1e-6, rtol=1e-5)


def test_the_older_trainers_call_the_same_function():
    given = data()
    done = ray_trainer.compute_advantage(given, adv_estimator="stepcredit_spro", config=OmegaConf.create({}))
    assert torch.equal(done.batch["advantages"], by_rows(given, "spro"))
    assert utils.compute_advantage is ray_trainer.compute_advantage
    from verl.experimental.separation import ray_trainer as separated

    assert separated.compute_advantage is ray_trainer.compute_advantage


def test_rewards_on_tokens_of_others_count_for_the_completion():
    """As in verl's estimators, which sum the whole row."""
    given = data()
    given.batch["response_mask"][0, 6] = 0  # the token with the score
    got = through_verl(given, "stepcredit_rloo")
    theirs = data()
    theirs.batch["response_mask"][0, 6] = 0
    torch.testing.assert_close(got, through_verl(theirs, "rloo"))
    assert got[0, 0] > 0 and got[0, 6] == 0


@credit()
def lengths(forest):
    return forest.token["position"].float()


def test_one_of_your_own():
    own = f"{__file__}:lengths"
    got = through_verl(data(), "stepcredit", name=own)
    assert torch.equal(got, torch.arange(T) * data().batch["response_mask"].float())


def test_nothing_is_kept_of_a_batch():
    through_verl(data(), "stepcredit_spro")
    function = core_algos.get_adv_estimator_fn("stepcredit_spro")
    given = data()
    with pytest.raises(UserError, match=r"without verl.trainer.ppo.ray_trainer.compute_advantage"):
        function(given.batch["token_level_rewards"], given.batch["response_mask"], given.non_tensor_batch["uid"])


WRONG = {
    "trees": ("stepcredit_treerpo", {}, "'treerpo' is one of trees"),
    "prime": (
        "stepcredit_prime",
        {},
        "reads 'prm_logprobs', which this batch does not have; they are those of a process",
    ),
    "option": ("stepcredit_spro", {"betta": 1.0}, "betta"),
    "no name": ("stepcredit", {}, "algorithm.stepcredit.name is not set"),
    "unknown": ("stepcredit", {"name": "sprro"}, "did you mean 'spro'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_an_error(case):
    name, options, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        through_verl(data(), name, **options)


def test_a_missing_reference_says_how_to_have_one():
    given = data()
    given.batch.pop("ref_log_prob")
    with pytest.raises(UserError, match=r"'ref_log_prob', which this batch does not have; .*use_kl_loss=True"):
        through_verl(given, "stepcredit_spro")


def test_other_columns_are_those_of_the_batch():
    """A credit of one's own and PRIME read what a worker put there, under its own name; otherwise it is asked for."""
    with pytest.raises(UserError, match="reads 'values', which this batch does not have; a worker of yours can add it"):
        through_verl(data(), "stepcredit", name=f"{__file__}:reads_values")
    given = data()
    added = torch.rand(given.batch["response_mask"].shape, generator=torch.Generator().manual_seed(1)) - 1
    given.batch["values"] = given.batch["prm_logprobs"] = added
    mask = given.batch["response_mask"].float()
    assert torch.equal(through_verl(given, "stepcredit", name=f"{__file__}:reads_values"), added * mask)
    own = by_rows(given, "prime", {"prm_logprobs": added})
    assert own.any() and torch.equal(through_verl(given, "stepcredit_prime"), own)


@credit("values")
def reads_values(forest):
    return forest.token["values"]


def test_hydra_takes_the_options(tmp_path):
    """verl's own config, with the words of a command line."""
    from hydra import compose, initialize_config_dir

    folder = Path(verl.__file__).parent / "trainer" / "config"
    words = ["algorithm.adv_estimator=stepcredit_spro", "+algorithm.stepcredit.beta=0.5"]
    with initialize_config_dir(str(folder), version_base=None):
        config = compose("ppo_trainer", overrides=words)
    given = data()
    keys = [f"{uid}_{row}_0" for row, uid in enumerate(given.non_tensor_batch["uid"])]
    done = utils.compute_advantage_for_multi_trajectories(
        given, batch_keys=keys, adv_estimator=config.algorithm.adv_estimator, config=config.algorithm
    )
    assert torch.equal(done.batch["advantages"], by_rows(given, "spro", beta=0.5))


def test_a_plugin_that_fails_says_so(tmp_path):
    """verl itself hides it: here an older verl without a registry."""
    code = (
        "import sys, types, logging; logging.basicConfig(level=logging.WARNING)\n"
        "fake = types.ModuleType('verl'); fake.__version__ = '0.1'; fake.__path__ = []\n"
        "sys.modules['verl'] = fake\n"
        "try:\n    import stepcredit.adapters.verl_plugin\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert out.stdout.strip() == "ModuleNotFoundError"
    assert "its credit functions are not in verl's registry" in out.stderr and "No module named" in out.stderr


def test_another_compute_advantage_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"no compute_advantage\(data, adv_estimator, ...\) in types"):
        adapter.wrap(__import__("types"))
    monkeypatch.delattr(core_algos, "register_adv_est")
    with pytest.raises(UserError, match=r"has no register_adv_est; the adapter was tested with verl 0.9"):
        adapter.register()


def test_another_version_is_said(monkeypatch, caplog):
    monkeypatch.setattr(verl, "__version__", "0.10.0")
    monkeypatch.setattr(core_algos, "ADV_ESTIMATOR_REGISTRY", {})
    monkeypatch.setattr(adapter, "wrap", lambda module: None)
    with caplog.at_level(logging.WARNING, "stepcredit"):
        adapter.register()
    assert "verl is 0.10.0; the adapter was tested with 0.9" in caplog.text
    assert {"stepcredit", "stepcredit_spro", "stepcredit_treerpo"} <= core_algos.ADV_ESTIMATOR_REGISTRY.keys()


def test_the_example_of_the_page_runs(capsys):
    page = (ROOT / "docs" / "verl.md").read_text()
    block = page.split("```python\n")[1].partition("```")[0]
    exec(block, {})
    assert capsys.readouterr().out == "tensor" + block.rpartition("# tensor")[2].replace("\n# ", "\n")
