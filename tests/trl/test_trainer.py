"""The credit functions inside TRL's own `GRPOTrainer`, on the CPU: `make test-trl`."""

import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

if "trl.trainer.grpo_trainer" not in sys.modules:  # conftest.py tried
    pytest.skip("make test-trl sets up TRL", allow_module_level=True)

import pandas as pd
from small_trainer import MODEL, PROMPTS, config, in_two_processes, reward, train, weights
from trl import GRPOTrainer

from stepcredit.adapters import trl as adapter
from stepcredit.adapters.rows import credit_rows
from stepcredit.adapters.trl import CreditGRPOTrainer, token_rewards
from stepcredit.errors import UserError


class Watched(CreditGRPOTrainer):
    """Keeps its batches."""

    def __init__(self, *args, **kwargs):
        self.batches, self.rewards_of = [], []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.batches.append({name: value.clone() for name, value in output.items() if isinstance(value, torch.Tensor)})
        return output

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)
        self.rewards_of.append(rewards.clone())
        return rewards


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------- TRL's own results


VARIANTS = {
    "plain": {},
    "an epoch more": {"num_iterations": 2},
    "small batches": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "truncated": {"mask_truncated_completions": True},
    "kl": {"beta": 0.1},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "sequence ratios": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_dr_grpo_ends_in_the_weights_of_trl(variant):
    """`scale_rewards="none"` is Dr. GRPO's credit; rewards of 0, 1, 2 in groups of 4 leave nothing to round."""
    theirs = train(GRPOTrainer, scale_rewards="none", **VARIANTS[variant])
    ours = train(CreditGRPOTrainer, credit="dr_grpo", scale_rewards="none", **VARIANTS[variant])
    if variant == "sequence ratios":  # one number a row there, here as many as tokens: added in another order
        for name, value in weights(theirs).items():
            torch.testing.assert_close(weights(ours)[name], value, atol=1e-5, rtol=0)
        return
    assert same(weights(ours), weights(theirs))
    assert not same(weights(ours), weights(train(GRPOTrainer, max_steps=0)))
    if variant == "truncated":
        assert 0 < logged(ours, "completions/clipped_ratio")[0] < 1
    for name in ("loss", "grad_norm", "completions/mean_length", "entropy"):
        assert logged(ours, name) == logged(theirs, name)


def test_grpo_is_trl_but_for_the_term_beside_the_std():
    theirs, ours = train(GRPOTrainer), train(CreditGRPOTrainer, credit="grpo")
    assert logged(ours, "loss")[0] == pytest.approx(logged(theirs, "loss")[0], rel=1e-3, abs=1e-5)
    assert logged(ours, "grad_norm")[0] == pytest.approx(logged(theirs, "grad_norm")[0], rel=1e-3)


# ---------------------------------------------------------------------- five steps


@pytest.mark.parametrize("options", [{}, {"beta": 0.01}, {"num_iterations": 2}])
def test_spro_trains(options):
    """The policy is its reference at first, and no longer after a step, with or without TRL's KL term."""
    trainer = train(CreditGRPOTrainer, credit="spro", credit_options={"beta": 1.0}, max_steps=5, **options)
    process = logged(trainer, "credit/process_rms")
    assert process[0] == 0.0 and all(value > 0 for value in process[1:] if value is not None)
    assert len(logged(trainer, "loss")) == 5 and not same(weights(trainer), weights(train(GRPOTrainer, max_steps=0)))
    assert trainer.beta == trainer.args.beta == options.get("beta", 0.0)


def test_the_reference_of_the_credit_alone_is_no_kl_term():
    """With a credit that reads the reference and gives 0 the weights stay where they are."""
    trainer = train(CreditGRPOTrainer, credit="small_trainer.reads_and_gives_nothing", max_steps=3)
    assert same(weights(trainer), weights(train(GRPOTrainer, max_steps=0)))
    assert logged(trainer, "credit/zero_groups") == [1.0] * 3 and not logged(trainer, "kl")


def test_opo_trains():
    trainer = train(CreditGRPOTrainer, credit="opo", max_steps=5)
    assert len(logged(trainer, "loss")) == 5 and all(value > 0 for value in logged(trainer, "credit/outcome_rms"))
    assert not logged(trainer, "credit/process_rms")


def test_adapters_are_compared_with_the_model_without_them():
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = train(CreditGRPOTrainer, credit="spro", max_steps=3, peft_config=lora, learning_rate=1e-2)
    assert trainer.ref_model is None
    process = logged(trainer, "credit/process_rms")
    assert process[0] == 0.0 and process[1] > 0 and process[2] > 0


def test_an_adapter_of_before_is_compared_with_its_start():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = train(
        CreditGRPOTrainer, model=get_peft_model(model, lora), credit="spro", max_steps=3, learning_rate=1e-2
    )
    process = logged(trainer, "credit/process_rms")
    assert process[0] == 0.0 and process[1] > 0


# ---------------------------------------------------------------------- what reaches credit and loss


def gradient_of(trainer, batch, advantages):
    """Of TRL's loss of a batch with these advantages."""
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, batch | {"advantages": advantages}).backward()
    return torch.cat([each.grad.flatten() for each in trainer.model.parameters()])


def test_one_token_with_credit_moves_the_weights_as_its_log_probability_does():
    """The gradient is that of -log p(token) over the tokens of the batch, by a plain forward of the model."""
    trainer = train(Watched, credit="small_trainer.third_token_of_the_second_completion", max_steps=1)
    batch = trainer.batches[0]
    given = batch["advantages"].nonzero().tolist()
    assert given == [[1, 2]] and batch["advantages"][1, 2] == 2.0
    got = gradient_of(trainer, batch, batch["advantages"])

    trainer.model.zero_grad()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)[1:2]
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)[1:2]
    position = batch["prompt_ids"].shape[1] + 2
    logprobs = trainer.model(input_ids=ids, attention_mask=mask).logits[0, position - 1].float().log_softmax(-1)
    (-2.0 * logprobs[ids[0, position]] / batch["completion_mask"].sum()).backward()
    wanted = torch.cat([each.grad.flatten() for each in trainer.model.parameters()])
    assert wanted.norm() > 1e-4
    assert (got - wanted).norm() < 1e-4 * wanted.norm()


def test_spro_reads_the_log_probabilities_of_both_models():
    """At the third step: advantages are those of plain forwards of the policy and of the model it started from."""
    from transformers import AutoModelForCausalLM

    options = {"beta": 1.0}
    trainer = train(Watched, credit="spro", credit_options=options, max_steps=2, learning_rate=1e-2)
    batch = dict(trainer.batches[-1])
    start = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    before = train(Watched, credit="spro", credit_options=options, max_steps=1, learning_rate=1e-2).model

    def logprobs(model):
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        with torch.no_grad():
            every = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
        return every.gather(2, ids[:, 1:, None]).squeeze(2)[:, -batch["completion_ids"].shape[1] :]

    columns = {"old_logprobs": logprobs(before), "ref_logprobs": logprobs(start)}
    groups = torch.arange(8) // 4
    rewards = trainer.rewards_of[-1].sum(1)
    wanted = credit_rows("spro", groups, batch["completion_mask"], rewards, columns, **options)
    assert (wanted.std(1) > 0.01).any()
    torch.testing.assert_close(batch["advantages"], wanted, atol=1e-4, rtol=1e-4)


def test_completions_that_no_function_judged_are_in_no_baseline(caplog):
    def sometimes(completion_ids, **_):
        return [None if number % 4 == 1 else value for number, value in enumerate(reward(completion_ids))]

    def rarely(completion_ids, **_):
        return [1.0 if number == 0 else None for number in range(len(completion_ids))]

    trainer = train(
        Watched, credit="rloo", max_steps=1, reward_funcs=[sometimes, rarely], reward_weights=[1.0, 2.0], seed=1
    )
    batch, rewards = trainer.batches[0], trainer.rewards_of[0]
    total = rewards[:, 0] + torch.tensor([2.0] + [0.0] * 7)
    assert total.isnan().nonzero().flatten().tolist() == [1, 5]
    wanted = credit_rows("rloo", torch.arange(8) // 4, batch["completion_mask"], total)
    assert torch.equal(batch["advantages"], wanted) and not wanted[1].any() and wanted.any()
    assert logged(trainer, "credit/unscored") == [0.25]


def test_truncated_completions_count_in_baselines_and_are_not_trained():
    trainer = train(
        Watched, credit="opo", max_steps=1, mask_truncated_completions=True, max_completion_length=12, seed=1
    )
    batch = trainer.batches[0]
    length = batch["completion_ids"].ne(trainer._tokenizer.pad_token_id).sum(1)
    cut = ~batch["completion_mask"].bool().any(1)
    assert 0 < cut.sum() < 8 and (length[cut] == 12).all()
    whole = torch.arange(batch["completion_ids"].shape[1]) < length[:, None]
    wanted = credit_rows("opo", torch.arange(8) // 4, whole, trainer.rewards_of[0].sum(1))
    assert wanted[cut].any() and torch.equal(batch["advantages"], wanted * batch["completion_mask"])
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum() < whole.sum()


def test_what_tools_said_has_no_advantage_and_no_length():
    """A rollout function marks each second token as another's (`env_mask`)."""

    def rollouts(prompts, trainer):
        tokenizer = trainer.processing_class
        lengths = [4 + number % 3 for number in range(len(prompts))]
        ids = [[5 + number + place for place in range(n)] for number, n in enumerate(lengths)]
        return {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": ids,
            "logprobs": None,
            "env_mask": [[1 - place % 2 for place in range(n)] for n in lengths],
        }

    trainer = train(Watched, credit="opo", max_steps=1, rollout_func=rollouts)
    batch = trainer.batches[0]
    mask = batch["completion_mask"] * batch["tool_mask"]
    wanted = credit_rows("opo", torch.arange(8) // 4, mask, trainer.rewards_of[0].sum(1))
    assert torch.equal(batch["advantages"], wanted) and wanted.any()
    assert not batch["advantages"][:, 1::2].any()

    @token_rewards
    def on_the_tools(completion_ids, **_):
        return [[0.0, 1.0, *[0.0] * (len(ids) - 2)] for ids in completion_ids]

    with pytest.raises(UserError, match="reward on token 1, which the policy did not sample"):
        train(CreditGRPOTrainer, credit="opo", max_steps=1, rollout_func=rollouts, reward_funcs=[on_the_tools])


def test_rewards_of_tokens_reach_the_credit():
    @token_rewards
    def halves(completion_ids, **_):
        return [None if len(ids) == 3 else [0.5, *[0.25] * (len(ids) - 1)] for ids in completion_ids]

    trainer = train(
        Watched, credit="reward_to_go", max_steps=1, reward_funcs=[reward, halves], reward_weights=[1.0, 2.0]
    )
    batch = trainer.batches[0]
    mask = batch["completion_mask"]
    dense = 2.0 * 0.25 * mask * (mask.sum(1) != 3)[:, None]
    dense[:, 0] *= 2
    wanted = credit_rows(
        "reward_to_go", torch.arange(8) // 4, mask, trainer.rewards_of[0][:, 0], {"token_rewards": dense}
    )
    assert torch.equal(batch["advantages"], wanted) and (wanted.std(1) > 0).any()
    sums = torch.where(mask.sum(1) == 3, torch.nan, dense.sum(1) / 2.0)
    torch.testing.assert_close(trainer.rewards_of[0][:, 1], sums, equal_nan=True)
    assert logged(trainer, "rewards/halves/mean")[0] == pytest.approx(float(sums.nanmean()))


WRONG_TOKENS = {
    "count": (lambda ids: [[0.0]], "halves returned 1 lists; expected 8"),
    "length": (lambda ids: [[0.0] * (len(one) + 1) for one in ids], r"numbers for completion 0 of \d+ tokens"),
    "number": (lambda ids: [1.0 for _ in ids], "returned 1.0 for completion 0; expected a list"),
    "nan": (lambda ids: [[float("nan")] * len(one) for one in ids], "completion 0 is not finite"),
}


@pytest.mark.parametrize("case", WRONG_TOKENS)
def test_token_rewards_that_do_not_fit(case):
    function, message = WRONG_TOKENS[case]

    def halves(completion_ids, **_):
        return function(completion_ids)

    with pytest.raises(UserError, match=message):
        train(CreditGRPOTrainer, credit="opo", max_steps=1, reward_funcs=[token_rewards(halves)])


def test_an_async_function_of_token_rewards_is_refused():
    async def later(**_):
        return []

    with pytest.raises(UserError, match="'later' is async"):
        token_rewards(later)


def test_evaluation_has_groups_of_its_own():
    trainer = train(
        Watched, credit="rloo", max_steps=1, num_generations_eval=2, per_device_eval_batch_size=4,
        eval_dataset=PROMPTS.select(range(2)), eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    batch, rewards = trainer.batches[-1], trainer.rewards_of[-1].sum(1)
    assert len(rewards) == 4
    wanted = credit_rows("rloo", [0, 0, 1, 1], batch["completion_mask"], rewards)
    assert torch.equal(batch["advantages"], wanted)
    assert logged(trainer, "eval_credit/zero_groups")


def test_the_table_of_completions_has_these_advantages(tmp_path):
    trainer = train(
        Watched,
        credit="spro",
        credit_options={"beta": 1.0},
        max_steps=2,
        log_completions=True,
        output_dir=str(tmp_path),
    )
    for step, batch in enumerate(trainer.batches, 1):
        table = pd.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        rows = [values[mask.bool()] for values, mask in zip(batch["advantages"], batch["completion_mask"], strict=True)]
        assert table["advantage"].tolist() == pytest.approx([float(row.mean()) for row in rows])
        for text, row in zip(table["token_advantages"], rows, strict=True):
            numbers = [float(word) for word in text.split()]
            expected = row[:1].tolist() if bool((row == row[0]).all()) else row.tolist()
            assert len(row) <= 16 and numbers == pytest.approx(expected, rel=0.01, abs=1e-3)


def test_a_long_completion_is_told_in_sixteen_numbers():
    assert adapter._compact(torch.arange(160.0)).split()[:2] == ["+4.5", "+14.5"]
    assert len(adapter._compact(torch.arange(1000.0)).split()) == 16
    assert adapter._compact(torch.full((50,), -0.25)) == "-0.25" and adapter._compact(torch.zeros(0)) == "not trained"


# ---------------------------------------------------------------------- several processes


def test_a_group_spread_over_two_processes_is_one(tmp_path):
    """Two processes with two rows each share a group of four; each keeps its rows of the whole group's credit."""
    in_two_processes(tmp_path, "spro")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(parts[0]["rewards"], parts[1]["rewards"])
    for step in range(2):
        batches = [part["batches"][step] for part in parts]
        width = max(batch["completion_mask"].shape[1] for batch in batches)
        wide = {
            name: torch.cat([torch.nn.functional.pad(each[name], (0, width - each[name].shape[1])) for each in batches])
            for name in ("completion_mask", "old_logprobs", "ref_logprobs", "advantages")
        }
        columns = {name: wide[name] for name in ("old_logprobs", "ref_logprobs")}
        rewards = parts[0]["rewards"][step]
        wanted = credit_rows("spro", [0] * 4, wide["completion_mask"], rewards, columns, beta=1.0)
        torch.testing.assert_close(wide["advantages"], wanted, atol=1e-6, rtol=1e-5)
        alone = credit_rows("spro", [0, 0, 1, 1], wide["completion_mask"], rewards, columns, beta=1.0)
        assert not torch.allclose(wide["advantages"], alone, atol=1e-3)
    assert parts[0]["logged"] == parts[1]["logged"] and json.dumps(parts[0]["logged"])
    assert len(parts[0]["logged"]["credit/outcome_rms"]) == 2


# ---------------------------------------------------------------------- what is refused


REFUSED = {
    "unknown": (dict(credit="sprro"), "did you mean 'spro'"),
    "trees": (dict(credit="treerpo"), "'treerpo' is one of trees"),
    "option": (dict(credit="spro", credit_options={"betta": 1.0}), "betta"),
    "column": (dict(credit="small_trainer.reads_values"), "reads 'values'; with TRL there are old_logprobs"),
    "objectives": (dict(credit="rloo", multi_objective_aggregation="normalize_then_sum"), "weighted sum: leave"),
    "epochs": (dict(credit="opo", num_iterations=2), "num_iterations must be 1, not 2"),
    "stale": (dict(credit="opo", steps_per_generation=2), "steps_per_generation must be a divisor"),
    "kl": (dict(credit="opo", beta=0.1), "beta must be 0, not 0.1"),
    "weights": (dict(credit="opo", loss_type="grpo"), "loss_type must be 'dapo' or 'dr_grpo'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case):
    given, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        train(CreditGRPOTrainer, max_steps=1, **given)


def test_scale_rewards_is_said_to_do_nothing(caplog):
    with caplog.at_level(logging.WARNING, "stepcredit"):
        train(CreditGRPOTrainer, credit="rloo", max_steps=0, scale_rewards="batch")
    assert "scale_rewards='batch' is not read: credit 'rloo' sets the scale" in caplog.text


def test_a_trl_without_what_is_overridden_is_refused(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", lambda self, inputs: None)
    with pytest.raises(UserError, match=r"no parameter 'prompts' of GRPOTrainer._calculate_rewards.*tested with TRL"):
        train(CreditGRPOTrainer, max_steps=0)
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    with pytest.raises(UserError, match=r"no GRPOTrainer._calculate_rewards"):
        train(CreditGRPOTrainer, max_steps=0)


def test_a_trl_that_does_not_call_it_is_refused(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", lambda self, inputs: {"advantages": None})
    with pytest.raises(UserError, match="no 'prompt_ids' of a batch"):
        train(CreditGRPOTrainer, credit="rloo", max_steps=1)


def test_another_version_is_said(monkeypatch, caplog):
    assert version("trl").startswith(f"{adapter.TESTED}.")
    monkeypatch.setattr(adapter.trl, "__version__", "1.17.0")
    with caplog.at_level(logging.WARNING, "stepcredit"):
        train(CreditGRPOTrainer, credit="rloo", max_steps=0)
    assert "TRL is 1.17.0; the adapter was tested with 1.16" in caplog.text


def test_a_trainer_without_arguments_has_those_of_trl(monkeypatch):
    monkeypatch.setattr(adapter, "GRPOConfig", lambda folder: config(output_dir=folder))  # its bf16 needs a GPU
    trainer = CreditGRPOTrainer(str(MODEL), reward_funcs=reward, train_dataset=PROMPTS)
    assert trainer.args.output_dir == f"{Path(MODEL).name}-GRPO" and trainer.credit == "spro"
    assert trainer.beta == trainer.args.beta == 0.0 and trainer.ref_model is not None


def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "trl.md").read_text()
    first, second = (block.partition("```")[0] for block in page.split("```python\n")[1:])
    names = {}
    exec(first, names)
    exec(second, names)
    assert logged(names["trainer"], "credit/process_rms")[0] == 0.0 and len(logged(names["trainer"], "loss")) == 5
    assert names["short_lines"](completion_ids=[[1, 2]]) == [-0.02]
