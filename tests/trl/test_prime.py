"""PRIME inside TRL: a process reward model that learns beside TRL's policy. `make test-trl`."""

import logging
import math
import sys

import pytest
import torch

if "trl.trainer.grpo_trainer" not in sys.modules:  # conftest.py tried
    pytest.skip("make test-trl sets up TRL", allow_module_level=True)

from small_trainer import MODEL, PROMPTS, in_two_processes, reward, right, train, weights
from transformers import AutoModelForCausalLM

from stepcredit.adapters.rows import credit_rows
from stepcredit.adapters.trl import CreditGRPOTrainer
from stepcredit.errors import UserError

FAST = {"learning_rate": 1e-2}
GROUPS = torch.arange(8) // 4


class Watched(CreditGRPOTrainer):
    """Keeps its batches, what its reward model gave for them, and the reward model as it was before each."""

    def __init__(self, *args, **kwargs):
        self.batches, self.read, self.before, self.rewards_of = [], [], [], []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.batches.append({name: value.clone() for name, value in output.items() if isinstance(value, torch.Tensor)})
        return output

    def _judged(self, *args):
        self.before.append(prm_weights(self))
        self.read.append(super()._judged(*args))
        return self.read[-1]

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)
        self.rewards_of.append(rewards.sum(1))
        return rewards


def prime(kind=CreditGRPOTrainer, prm=FAST, beta=1.0, reward_funcs=right, credit_options=None, **options):
    options = {"max_steps": 3, "learning_rate": 1e-2} | options
    return train(
        kind, credit="prime", credit_options={"beta": beta} | (credit_options or {}), prm=prm,
        reward_funcs=reward_funcs, **options,
    )  # fmt: skip


def prm_weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.reward_model.prm.policy.state_dict().items()}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def plain_logprobs(batch, state=None, present=None):
    """[B, T] by an ordinary forward of the embedded model, or of one with these weights of a reward model."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    if state is not None:
        model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()}, strict=False)
        assert torch.equal(model.get_input_embeddings().weight, state["model.model.embed_tokens.weight"])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"] if present is None else present], 1)
    with torch.no_grad():
        every = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
    return every.gather(2, ids[:, 1:, None]).squeeze(2)[:, -batch["completion_ids"].shape[1] :]


def test_prime_trains():
    """Process rewards are 0 while the reward model is its start: in the first batch, before it has learnt."""
    trainer = prime(max_steps=5)
    process = logged(trainer, "credit/process_rms")
    assert process[0] == 0.0 and all(value > 0 for value in process[1:])
    assert logged(trainer, "prm/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(logged(trainer, "loss")) == len(logged(trainer, "prm/accuracy")) == len(logged(trainer, "prm/loss")) == 5
    assert trainer.ref_model is None and trainer.beta == trainer.args.beta == 0.0 and not logged(trainer, "kl")
    start = prime(max_steps=0)
    assert not same(weights(trainer), weights(start)) and not same(prm_weights(trainer), prm_weights(start))


def test_the_reward_model_learns_what_it_sees():
    """On batches of the same policy, whose learning rate is 0, its loss falls and its accuracy rises."""

    def first_is_even(completion_ids, **_):
        return [float(ids[0] % 2 == 0) for ids in completion_ids]

    trainer = prime(max_steps=12, learning_rate=0.0, prm={"learning_rate": 1e-3}, reward_funcs=first_is_even)
    loss = logged(trainer, "prm/loss")
    assert sum(loss[-3:]) / 3 < 0.8 * loss[0] and sum(logged(trainer, "prm/accuracy")[-3:]) / 3 > 0.8


@pytest.mark.parametrize("update", ["after", "before"])
def test_the_credit_is_that_of_prime_on_the_same_rows(update):
    """And its columns are those of plain forwards of the reward model and of its start."""
    trainer = prime(Watched, prm=FAST | {"update": update}, max_steps=2)
    for batch, read, rewards in zip(trainer.batches, trainer.read, trainer.rewards_of, strict=True):
        wanted = credit_rows("prime", GROUPS, batch["completion_mask"], rewards, read, beta=1.0)
        assert torch.equal(batch["advantages"], wanted)
    mask = trainer.batches[1]["completion_mask"]
    model = trainer.before[1] if update == "after" else prm_weights(trainer)
    for name, state in (("prm_logprobs", model), ("ref_logprobs", None)):
        expected = plain_logprobs(trainer.batches[1], state) * mask
        torch.testing.assert_close(trainer.read[1][name], expected, atol=1e-4, rtol=1e-4)
    assert (trainer.read[1]["prm_logprobs"] - trainer.read[1]["ref_logprobs"]).abs().max() > 1e-2
    first = logged(trainer, "credit/process_rms")[0]
    assert first == 0.0 if update == "after" else first > 0


def test_one_that_does_not_learn_stays_its_start():
    trainer = prime(prm={"update": "none"})
    assert logged(trainer, "credit/process_rms") == [0.0] * 3
    assert same(prm_weights(trainer), prm_weights(prime(max_steps=0)))


def test_a_step_of_the_reward_model_is_that_of_plain_autograd():
    """Cross-entropy of sigmoid(beta * sum of log-ratios), by an ordinary forward and AdamW, from the same batch."""
    trainer = prime(Watched, max_steps=1)
    batch = trainer.batches[0]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    every = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
    chosen = every.gather(2, ids[:, 1:, None]).squeeze(2)[:, -batch["completion_ids"].shape[1] :]
    total = ((chosen - chosen.detach()) * batch["completion_mask"]).sum(1)
    torch.nn.functional.binary_cross_entropy_with_logits(total, trainer.rewards_of[0]).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    assert logged(trainer, "prm/grad_norm")[0] == pytest.approx(float(norm), rel=1e-3)
    moved = prm_weights(trainer)
    for name, value in model.named_parameters():
        change = moved[f"model.{name}"] - value
        large = value.grad.abs() > 1e-4  # Adam's first step has the size of the rate and the sign of the gradient
        assert torch.equal(change[large].sign(), -value.grad[large].sign())


def test_without_its_part_prime_is_rloo():
    """To the last bit: the reward model disturbs neither TRL's random numbers nor its weights."""
    assert same(
        weights(prime(credit_options={"process_coef": 0.0})),
        weights(train(CreditGRPOTrainer, credit="rloo", reward_funcs=right, learning_rate=1e-2)),
    )


def test_the_policy_itself_is_the_reference():
    trainer = prime(Watched, prm=FAST | {"reference": "policy"}, max_steps=2)
    assert trainer.reward_model.reference is None and trainer.ref_model is None
    old = train(
        Watched, credit="prime", credit_options={"beta": 1.0}, prm=FAST | {"reference": "policy"}, reward_funcs=right,
        max_steps=1, learning_rate=1e-2,
    ).model  # fmt: skip
    state = {f"model.{name}": value for name, value in old.state_dict().items()}
    batch = trainer.batches[1]
    expected = plain_logprobs(batch, state) * batch["completion_mask"]
    torch.testing.assert_close(trainer.read[1]["ref_logprobs"], expected, atol=1e-4, rtol=1e-4)


def test_a_reward_model_of_its_own():
    one, other = prime(prm=FAST | {"model": "embedded"}), prime()
    assert same(prm_weights(one), prm_weights(other)) and same(weights(one), weights(other))


def test_a_resumed_run_ends_as_one_left_alone(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = prime(output_dir=str(tmp_path / "whole"), **options)
    again = prime(output_dir=str(tmp_path / "again"), resume=str(tmp_path / "whole" / "checkpoint-2"), **options)
    assert same(weights(whole), weights(again)) and same(prm_weights(whole), prm_weights(again))
    states = [each.reward_model.prm.learner.tensors() for each in (whole, again)]
    assert states[0] and same(*states)
    for name in ("prm/loss", "prm/grad_norm", "credit/process_rms", "loss"):
        assert logged(whole, name) == logged(again, name)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4" / "prm", dtype=torch.float32)
    for name, value in saved.named_parameters():
        assert torch.equal(value, prm_weights(whole)[f"model.{name}"])


def test_what_does_not_continue(tmp_path):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    prime(output_dir=str(tmp_path / "prime"), **options)
    train(CreditGRPOTrainer, credit="rloo", reward_funcs=right, output_dir=str(tmp_path / "rloo"), **options)
    with pytest.raises(UserError, match=r"holds no process reward model \(training_state.pt\)"):
        prime(resume=str(tmp_path / "rloo" / "checkpoint-1"))
    with pytest.raises(UserError, match=r"was trained with beta 1.0, not 0.5"):
        prime(resume=str(tmp_path / "prime" / "checkpoint-1"), beta=0.5)
    with pytest.raises(UserError, match=r"was trained with reference start, not policy"):
        prime(resume=str(tmp_path / "prime" / "checkpoint-1"), prm=FAST | {"reference": "policy"})
    with pytest.raises(UserError, match="the model is not the one that the run began with"):
        prime(resume=str(tmp_path / "prime" / "checkpoint-1"), model=str(tmp_path / "rloo" / "checkpoint-1"))


def test_a_rate_of_this_run_is_kept_when_it_continues(tmp_path):
    prime(output_dir=str(tmp_path), max_steps=1, save_strategy="steps", save_steps=1)
    trainer = prime(resume=str(tmp_path / "checkpoint-1"), prm={"learning_rate": 1e-4}, max_steps=2)
    assert {group["lr"] for group in trainer.reward_model.prm.learner.optimizer.param_groups} == {1e-4}
    steps = [value for name, value in trainer.reward_model.prm.learner.tensors().items() if name.endswith(".step")]
    assert {float(each) for each in steps} == {2.0}


def test_a_reward_model_shared_by_two_processes_is_one(tmp_path):
    in_two_processes(tmp_path, "prime")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert same(parts[0]["prm"], parts[1]["prm"]) and not same(parts[0]["prm"], prm_weights(prime(max_steps=0)))
    assert parts[0]["logged"] == parts[1]["logged"] and len(parts[0]["logged"]["prm/loss"]) == 2
    for step in range(2):
        batches = [part["batches"][step] for part in parts]
        read = [batch["read"] for batch in batches]
        assert same(*read)
        width = read[0]["prm_logprobs"].shape[1]
        mask, advantages = (
            torch.cat([torch.nn.functional.pad(each[name], (0, width - each[name].shape[1])) for each in batches])
            for name in ("completion_mask", "advantages")
        )
        wanted = credit_rows("prime", [0] * 4, mask, parts[0]["rewards"][step], read[0], beta=1.0)
        torch.testing.assert_close(advantages, wanted, atol=1e-6, rtol=1e-5)


def rollouts_with_tools(prompts, trainer):
    """Each second token is another's (`env_mask`)."""
    tokenizer = trainer.processing_class
    lengths = [4 + number % 3 for number in range(len(prompts))]
    ids = [[5 + (3 * number + place) % 9 for place in range(n)] for number, n in enumerate(lengths)]
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": ids,
        "logprobs": None,
        "env_mask": [[1 - place % 2 for place in range(n)] for n in lengths],
    }


def test_what_tools_said_is_read_and_not_counted():
    trainer = prime(Watched, rollout_func=rollouts_with_tools, max_steps=2)
    batch, read = trainer.batches[1], trainer.read[1]
    mask = batch["completion_mask"] * batch["tool_mask"]
    assert not read["prm_logprobs"][:, 1::2].any() and mask[:, 2].all()
    for name, state in (("prm_logprobs", trainer.before[1]), ("ref_logprobs", None)):
        torch.testing.assert_close(read[name], plain_logprobs(batch, state) * mask, atol=1e-4, rtol=1e-4)
    wanted = credit_rows("prime", GROUPS, mask, trainer.rewards_of[1], read, beta=1.0)
    assert torch.equal(batch["advantages"], wanted) and wanted.any()


def test_nothing_is_learnt_from_truncated_completions():
    short = {"max_steps": 1, "max_completion_length": 2}
    start = prm_weights(prime(max_steps=0))
    assert same(prm_weights(prime(mask_truncated_completions=True, **short)), start)
    assert not same(prm_weights(prime(**short)), start)


def test_nothing_is_learnt_from_what_no_function_judged():
    def sometimes(completion_ids, **_):
        return [None if number % 4 == 1 else value for number, value in enumerate(right(completion_ids))]

    trainer = prime(Watched, reward_funcs=sometimes, max_steps=1, seed=1)
    everyone = prime(Watched, max_steps=1, seed=1)
    assert torch.equal(trainer.batches[0]["completion_ids"], everyone.batches[0]["completion_ids"])
    assert logged(trainer, "prm/grad_norm") != logged(everyone, "prm/grad_norm")
    nothing = prime(reward_funcs=lambda completion_ids, **_: [None] * len(completion_ids), max_steps=1)
    assert same(prm_weights(nothing), prm_weights(prime(max_steps=0)))


def test_evaluation_teaches_nothing():
    trainer = prime(
        Watched, max_steps=2, num_generations_eval=2, per_device_eval_batch_size=4,
        eval_dataset=PROMPTS.select(range(2)), eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    assert len(logged(trainer, "eval_prm/loss")) == 2 and len(logged(trainer, "prm/loss")) == 2
    assert not logged(trainer, "eval_prm/grad_norm")
    evaluated = [number for number, batch in enumerate(trainer.batches) if len(batch["advantages"]) == 4]
    last = evaluated[-1]
    assert same(trainer.before[last], prm_weights(trainer)) and not same(trainer.before[last], trainer.before[0])
    wanted = credit_rows(
        "prime", [0, 0, 1, 1], trainer.batches[last]["completion_mask"], trainer.rewards_of[last], trainer.read[last],
        beta=1.0,
    )  # fmt: skip
    assert torch.equal(trainer.batches[last]["advantages"], wanted)


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")


def test_adapters_need_a_reward_model_of_its_own():
    with pytest.raises(UserError, match="name the model it starts from"):
        prime(peft_config=lora(), max_steps=0)
    trainer = prime(prm=FAST | {"model": "embedded"}, peft_config=lora())
    assert all(value > 0 for value in logged(trainer, "credit/process_rms")[1:])


REFUSED = {
    "reward": (dict(reward_funcs=reward), r"has the reward 2, and its process reward model learns from outcomes in"),
    "option": (dict(prm={"learning_rat": 1.0}), "did you mean 'learning_rate'"),
    "value": (dict(prm={"update": "later"}), "prm.update"),
    "temperature": (dict(prm={"reference": "policy"}, temperature=0.7), "'policy' needs temperature 1"),
    "model": (dict(prm={"model": "./nowhere"}), "prm.model: './nowhere' is no folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case):
    given, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        prime(**given)


def test_options_of_a_reward_model_that_nobody_reads_are_refused():
    with pytest.raises(UserError, match="prm: credit 'rloo' reads no process reward model"):
        train(CreditGRPOTrainer, credit="rloo", prm=FAST)


def test_checkpoints_without_a_reward_model_are_told(caplog, tmp_path):
    with caplog.at_level(logging.WARNING, "stepcredit"):
        trainer = prime(
            max_steps=1, save_only_model=True, save_strategy="steps", save_steps=1, output_dir=str(tmp_path)
        )
    assert "save_only_model: checkpoints have no process reward model" in caplog.text
    assert not (tmp_path / "checkpoint-1" / "prm").exists()
    trainer.reward_model.save(tmp_path / "own")
    assert (tmp_path / "own" / "model.safetensors").is_file()
