"""A small training with TRL, and credit functions made by hand. As a program: one of several processes."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig

import stepcredit
from stepcredit.credit import credit
from stepcredit.policy.loading import EMBEDDED_MODEL

MODEL = EMBEDDED_MODEL
PROMPTS = Dataset.from_list([{"prompt": f"a={number} b=a+2 b?"} for number in range(16)])  # answers of 3 to 12 tokens
SMALL = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 12,
    "max_steps": 3,
    "report_to": [],
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "seed": 0,
    "disable_tqdm": True,
}
TRAINER = ("eval_dataset", "peft_config", "rollout_func", "credit", "credit_options", "prm", "resume")


def reward(completion_ids, **_):
    """0, 1 or 2: in groups of 4 their means and differences are exact in fp32."""
    return [float(sum(ids) % 3) for ids in completion_ids]


def right(completion_ids, **_):
    """0 or 1, for what learns from outcomes."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def config(**options):
    return GRPOConfig(**({"output_dir": tempfile.mkdtemp()} | SMALL | options))


def train(kind, model=None, reward_funcs=reward, **options):
    """Train the embedded model with a class of trainers; options are TRL's and the trainer's own."""
    own = {name: options.pop(name) for name in TRAINER if name in options}
    resume = own.pop("resume", None)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    args = config(**options)
    model = str(MODEL) if model is None else model
    trainer = kind(
        model, reward_funcs=reward_funcs, args=args, train_dataset=PROMPTS, processing_class=tokenizer, **own
    )
    if args.max_steps:
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


@credit()
def third_token_of_the_second_completion(forest):
    row = forest.token["segment"] == 1
    return 2.0 * (row & (forest.token["position"] == 2)).float()


@credit("old_logprobs", "ref_logprobs")
def reads_and_gives_nothing(forest):
    return torch.zeros(forest.num_tokens)


@credit("values")
def reads_values(forest):
    return forest.token["values"]


def in_two_processes(folder, credit):
    """Start `main` in two processes that know of each other, and wait for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment |= {"PYTHONPATH": str(Path(stepcredit.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), credit],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]


def main(folder, credit):
    """Two steps of a process that has half of each group; what it saw goes to a file."""
    from stepcredit.adapters.trl import CreditGRPOTrainer

    batches, rewards = [], []

    class Watched(CreditGRPOTrainer):
        def _columns(self, output):
            self.last = super()._columns(output)
            return self.last

        def _judged(self, *args):
            self.read = super()._judged(*args)
            return self.read

        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            names = ("completion_mask", "advantages")
            batches.append({name: output[name] for name in names} | self.last | {"read": self.read})
            return output

        def _calculate_rewards(self, *args):
            rewards.append(super()._calculate_rewards(*args))
            return rewards[-1]

    own = {"prm": {"learning_rate": 1e-2}, "reward_funcs": right} if credit == "prime" else {}
    trainer = train(
        Watched, credit=credit, credit_options={"beta": 1.0}, max_steps=2, per_device_train_batch_size=2,
        learning_rate=1e-2, seed=3, **own,
    )  # fmt: skip
    rank = trainer.accelerator.process_index
    assert trainer.accelerator.num_processes == 2
    names = {name for entry in trainer.state.log_history for name in entry if name.startswith(("credit/", "prm/"))}
    logged = {name: [entry[name] for entry in trainer.state.log_history if name in entry] for name in sorted(names)}
    saved = {"batches": batches, "rewards": torch.stack(rewards).sum(2), "logged": logged}
    if trainer.reward_model is not None:
        saved["prm"] = trainer.reward_model.prm.policy.state_dict()
    torch.save(saved, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
