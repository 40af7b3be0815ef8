"""Whole training steps of stepcredit as a user gets them, for the benchmarks that take steps apart.

The model is a random Qwen2 of about 3 million parameters whose stop token is as likely as a case wants it: every input
embedding, which is the output embedding too, has the same number in its first place, and the stop token's has another.
So whatever is sampled with these weights stops by itself, without help from the sampler.
"""

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from forest import VOCABULARY, make_policy
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from stepcredit.config import resolve
from stepcredit.forest import Forest
from stepcredit.policy.forward import Policy, choose_scoring_form
from stepcredit.run.build import build_parts
from stepcredit.run.source import Position
from stepcredit.run.trainer import Trainer

PAD, STOP = 0, 1
RATE = 1e-9  # of learning: all steps are of one model, and its completions stay as long as they are
BIAS = 0.3  # first place of every embedding; the noise of the others has a deviation of 0.02


@dataclass(frozen=True)
class Case:
    """A step: `prompts` prompts of `prompt` tokens, `group` completions of each, of at most `tokens` tokens.

    With `length` they stop by themselves, after about so many tokens on average; otherwise none stops early. A model of
    one's own stops when it does, and its prompts are as long as they are.
    """

    prompt: int
    tokens: int
    prompts: int
    length: int = 0
    group: int = 8
    reward: str = "even.share_even"

    @property
    def rows(self) -> int:
        return self.prompts * self.group


CASES = {
    "a": Case(prompt=32, tokens=64, prompts=32, length=24),
    "b": Case(prompt=256, tokens=64, prompts=8),
    "c": Case(prompt=1024, tokens=128, prompts=4),
}


@torch.no_grad()
def set_stop(model: PreTrainedModel, chance: float) -> None:
    """Make the stop token so likely after random tokens."""
    weight = model.get_input_embeddings().weight
    weight[:, 0] = BIAS
    ids = torch.randint(2, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        states = model.base_model(ids).last_hidden_state
        found = (states @ weight.T).log_softmax(-1)[..., STOP].exp().mean()
        weight[STOP, 0] += (math.log(chance) - found.log()) / states[..., 0].mean()


def make_folder(case: Case, folder: Path, num_prompts: int) -> Path:
    """Model, tokenizer and prompts, as files that every trainer reads."""
    words = {"<pad>": PAD, "<stop>": STOP} | {f"w{number}": number for number in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<stop>")
    model = make_policy().model
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = STOP, PAD
    set_stop(model, 1 / case.length if case.length else 1e-12)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (num_prompts, case.prompt), generator=generator).tolist()
    rows = [{"id": str(number), "question": " ".join(f"w{one}" for one in row)} for number, row in enumerate(ids)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def folder_of(model: Path, data: Path, folder: Path, num_prompts: int) -> Path:
    """A model of one's own beside the first rows of a data set, as `make_folder` lays them out; nothing is copied."""
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.absolute())
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    if len(rows) < num_prompts:
        raise SystemExit(f"{data} has {len(rows)} rows; {num_prompts} are needed, so that no step repeats a prompt")
    chosen = [{"id": str(number), **row} for number, row in enumerate(rows[:num_prompts])]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return folder


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of `make_folder` or `folder_of`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    made_here = "TokenizersBackend" in (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    kind = PreTrainedTokenizerFast if made_here else AutoTokenizer  # the latter would take Qwen2's own
    return model, kind.from_pretrained(folder)


def make_trainer(case: Case, folder: Path, **given: Any) -> Trainer:
    """A trainer with the defaults of stepcredit, but for what the case says."""
    config = resolve(
        {
            "model": str(folder),
            "task": {"data": str(folder / "prompts.jsonl"), "eval_data": str(folder / "prompts.jsonl")},
            "sampler": {"max_new_tokens": case.tokens},
            "growth": {"group_size": case.group},
            "reward": {
                "functions": [case.reward],
                "gold_check": 0,
                "workers": 0,
            },  # in this process, as TRL calls it
            "train": {"problems_per_iteration": case.prompts, "device": "cpu", "iterations": 1000},
            "optim": {"learning_rate": RATE},
            "eval": {"num_problems": 0},
            **given,
        }
    )
    torch.manual_seed(0)
    policy = Policy(*load(folder))
    choose_scoring_form(policy)
    return Trainer(config, build_parts(config), policy, Console(quiet=True))


@dataclass(frozen=True)
class Step:
    """Seconds of a step, its parts, its finished forest and its metrics."""

    seconds: dict[str, float]
    forest: Forest
    metrics: dict[str, float]


def take_step(trainer: Trainer, again: bool = False) -> Step:
    """One iteration, as `Trainer.run` does it; in the way `stepcredit train` sets torch up.

    Args:
        again: with the problems and seeds of the first one.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    started = time.perf_counter()
    if again:
        trainer.source.position = Position()
    work, number = trainer.begin(), trainer.done + 1
    for step in trainer.policy_update.steps(work.forest, number):
        trainer.update(work, step, number, None)  # type: ignore[arg-type]
    trainer.source.sync(trainer.policy, number)
    metrics = work.metrics(trainer.config)
    trainer.done, trainer.source.position = number, replace(work.position)
    whole = time.perf_counter() - started
    torch.use_deterministic_algorithms(False)
    parts = {name.removeprefix("time/"): value for name, value in work.clock.seconds.items()}
    return Step({"step": whole, **parts}, work.forest, metrics)
