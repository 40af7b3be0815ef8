"""Steps of TRL's `GRPOTrainer` in bf16 on the device, with what makes it fastest there.

bf16 by autocast over fp32 weights, as stepcredit has it; sdpa; no gradient checkpointing; nothing logged or saved; GRPO
without KL term, exactly on-policy, one AdamW step (fused, TRL's default) a batch.
"""

import importlib.util
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from even import share_even

from gpu_stages.bench import Bench
from gpu_stages.shapes import SHAPES, load, make_folder

RATE = 1e-9  # of learning: all steps are of one model

Seconds = dict[str, float]


@dataclass(frozen=True)
class Given:
    """A step: `prompts` prompts of `prompt` tokens, `group` completions of each of exactly `tokens` tokens.

    Attributes:
        sampled: with TRL's `generate`; otherwise completions are random tokens, for the update alone.
    """

    shape: str
    prompts: int
    prompt: int
    group: int
    tokens: int
    sampled: bool = True

    @property
    def rows(self) -> int:
        return self.prompts * self.group


def have_trl() -> bool:
    return importlib.util.find_spec("trl") is not None


def steps_of_trl(bench: Bench, given: Given, folder: Path, micro_batch: int) -> list[Seconds]:
    """Seconds of each step after one that warms up, of its sampling and of its update.

    Args:
        micro_batch: completions of one.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    steps = bench.repeats + 1
    make_folder(given.shape, folder, given.prompts * steps, given.prompt, bench.device)
    taken: list[Seconds] = []
    now: Seconds = {}

    def clock() -> float:
        bench.wait()
        return time.perf_counter()

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *others: Any) -> Any:
            started = clock()
            if given.sampled:
                found = super()._generate_single_turn(prompt_ids, *others)
            else:
                ids = torch.randint(2, SHAPES[given.shape][-1], (len(prompt_ids), given.tokens))
                found = ids.tolist(), None
            now["sampling"] = clock() - started
            now["length"] = sum(map(len, found[0])) / len(found[0])
            return found

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            found = super()._generate_and_score_completions(inputs)
            now["scored"] = clock()
            return found

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            now["begun"] = clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended = clock()
            taken.append({name: now[name] for name in ("sampling", "length")})
            taken[-1] |= {"step": ended - now["begun"], "update": ended - now["scored"]}

    cuda = bench.device.type == "cuda"
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=not cuda,
        bf16=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=given.rows // micro_batch,
        num_generations=given.group,
        max_completion_length=given.tokens,
        generation_kwargs={"use_cache": True, "min_new_tokens": given.tokens},
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_steps=steps,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model, words = load(folder)
    model.config.use_cache = False
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    data = Dataset.from_list([{"prompt": json.loads(line)["question"]} for line in lines])
    trainer = Timed(model, share_even, config, data, processing_class=words, callbacks=[Steps()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return taken[1:]
