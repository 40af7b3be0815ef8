"""`stepcredit warmstart`: train the embedded base model from random weights on generated demonstrations.

A Qwen3 of 0.15M parameters with a word-level tokenizer is trained by cross-entropy on worked solutions with human
faults (`demo/demonstrations.py`), easy problems first. Muon moves the matrices, AdamW the rest.
"""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from stepcredit.demo.chain import DISTRACTORS, LEVELS, SPECIALS, WORDS, generate
from stepcredit.demo.demonstrations import Demonstrator
from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import save_policy

MUON_RATE = 0.02
ADAM_RATE = 4e-3
WARM_UP = 50


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; a prompt starts with `<bos>`."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", WORDS.index("<bos>"))]
    )
    pad, bos, eos = SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, bos_token=bos, eos_token=eos)


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int = 64, layers: int = 3) -> Qwen3ForCausalLM:
    """A small Qwen3 with random weights."""
    config = Qwen3Config(
        vocab_size=-(-len(WORDS) // 8) * 8,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def warmstart(
    steps: int,
    batch_size: int,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    demonstrator: Demonstrator | None = None,
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Train a fresh base model on `steps * batch_size` demonstrations.

    Args:
        on_step: called with the step number and its loss (nats per response token).
    """
    torch.manual_seed(seed)
    rng = random.Random(f"warmstart/{seed}")
    demonstrator = demonstrator or Demonstrator()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.0),
        torch.optim.AdamW(others, lr=ADAM_RATE, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(steps)) for optimizer in optimizers]
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    for step in range(steps):
        ids, mask = _batch(rng, demonstrator, vocabulary, batch_size, progress=step / steps)
        logits = model(input_ids=ids).logits[:, :-1]  # right padding needs no mask: nothing attends to what comes later
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = losses[mask[:, 1:].flatten()].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        on_step(step, float(loss.detach()))
    return model.eval(), tokenizer


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a folder that `from_pretrained` loads."""
    save_policy(Policy(model, tokenizer), folder)


def _rate(steps: int) -> Callable[[int], float]:
    """Linear warm-up, then a cosine to zero."""

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
        return min(1.0, (step + 1) / WARM_UP) * cosine

    return rate


def _batch(
    rng: random.Random, demonstrator: Demonstrator, vocabulary: dict[str, int], size: int, progress: float
) -> tuple[Tensor, Tensor]:
    """Token ids [size, longest], right-padded, and the mask of response tokens."""
    hardest = min(max(LEVELS), 1 + int(2 * progress * max(LEVELS)))  # every level from half of the training on
    distractors = [count for count in DISTRACTORS if count <= 8 * progress]
    rows, masks = [], []
    for _ in range(size):
        chain = generate(rng, rng.randint(1, hardest), rng.choice(distractors))
        prompt = ["<bos>", *chain.question().split()]
        response = [*demonstrator.solve(chain, rng).split(), "<eos>"]
        rows.append(torch.tensor([vocabulary[word] for word in prompt + response]))
        masks.append(torch.tensor([False] * len(prompt) + [True] * len(response)))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
