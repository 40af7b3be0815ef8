"""Losses and their gradients against TRL's own, on one tiny random model and one ragged batch.

The policy has moved since sampling, so that ratios are apart and clips act. Both get the same advantages, those of our
credit function, and log-probabilities of before. TRL's loss is what `GRPOTrainer.compute_loss` returns for its
`loss_type`; rloo stands there twice: its advantages under GRPOTrainer's token mean (loss_type bnpo), and RLOOTrainer's
own loss, whose ratio is of the whole completion, on-policy, where only the gradient is the same. The gradient is
compared over all weights, relative to its largest entry; above `BOUND` the script ends with 1.

python benchmarks/losses_vs_trl.py [--seed N] [--json FILE]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from steps import PAD, Case, load, make_folder
from torch import Tensor

from stepcredit.config import resolve
from stepcredit.credit import CREDIT, assign
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.losses.choose import build_objective
from stepcredit.policy.forward import Policy

BOUND = 1e-5
LONGEST = 12  # tokens of a completion at most
MOVED = 0.2  # deviation of the log-ratios of tokens


@dataclass(frozen=True)
class Pair:
    """A row of `ALGORITHMS` with options on top, and TRL's options for the same."""

    algorithm: str
    trl: Mapping[str, Any]
    ours: Mapping[str, Any] = field(default_factory=dict)
    trainer: str = "GRPOTrainer"
    on_policy: bool = False


WIDE = {"loss": {"clip_low": 0.02, "clip_high": 0.03}}
PAIRS = {
    "grpo": Pair("grpo", {"loss_type": "grpo", "epsilon": 0.2}),
    "dapo": Pair("dapo", {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "dr_grpo": Pair("dr_grpo", {"loss_type": "dr_grpo", "epsilon": 0.2}),
    "cispo": Pair("cispo", {"loss_type": "cispo", "epsilon_high": 1.1}, {"loss": {"clip_high": 0.1}}),
    "gspo": Pair(
        "gspo",
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
        WIDE,
    ),
    "rloo": Pair("rloo", {"loss_type": "bnpo", "epsilon": 0.2}),
    "rloo, RLOOTrainer": Pair(
        "rloo", {}, {"objective": {"aggregate": "seq_mean_token_sum"}}, trainer="RLOOTrainer", on_policy=True
    ),
}


def ragged(seed: int, vocabulary: int) -> Forest:
    """Four groups of five completions of 1 to LONGEST tokens, with rewards of 0 and 1, no group uniform."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> list[int]:
        size = int(torch.randint(1, most + 1, (), generator=generator))
        return torch.randint(2, vocabulary, (size,), generator=generator).tolist()

    trees = []
    for number in range(4):
        segments = [Segment(tokens(LONGEST), reward=float(place % (number + 2) == 0)) for place in range(5)]
        trees.append(Tree(Problem(id=str(number)), tokens(6), segments))
    return Forest.from_trees(trees)


def padded(forest: Forest) -> tuple[dict[str, Tensor], Tensor]:
    """The batch as TRL has it, prompts padded on the left, completions on the right; and the token of each place."""
    trees = forest.to_trees()
    rows = [(tree.prompt_ids, segment.token_ids) for tree in trees for segment in tree.segments]
    widths = [max(len(row[side]) for row in rows) for side in range(2)]
    shape = len(rows), widths[1]
    ids, prompts = torch.full(shape, PAD), torch.full((len(rows), widths[0]), PAD)
    mask, prompt_mask = torch.zeros_like(ids), torch.zeros_like(prompts)
    token, first = torch.zeros(shape, dtype=torch.long), 0
    for row, (prompt, completion) in enumerate(rows):
        prompts[row, widths[0] - len(prompt) :] = torch.tensor(prompt)
        prompt_mask[row, widths[0] - len(prompt) :] = 1
        ids[row, : len(completion)] = torch.tensor(completion)
        mask[row, : len(completion)] = 1
        token[row, : len(completion)] = torch.arange(first, first + len(completion))
        first += len(completion)
    found = {"prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": ids, "completion_mask": mask}
    return found, token


def prepared(pair: Pair, forest: Forest, policy: Policy, seed: int) -> tuple[Forest, Any]:
    """Advantages, old log-probabilities and weights on the forest; and the objective."""
    given = {"algorithm": pair.algorithm, "sampler": {"max_new_tokens": LONGEST}, **pair.ours}
    config = resolve(given | {"model": "tiny"})
    forest = assign(forest, config.credit.name, CREDIT[config.credit.name], config.credit.options)
    with torch.no_grad():
        now = policy(forest, 1.0, False).logprobs
    noise = torch.randn(len(now), generator=torch.Generator().manual_seed(seed)) * MOVED
    objective = build_objective(config, flat=True)
    forest = forest.with_token(old_logprobs=now + noise * (not pair.on_policy))
    return forest.with_token(weights=objective.weights(forest)), objective


def ours(forest: Forest, objective: Any, policy: Policy) -> tuple[float, list[Tensor]]:
    policy.zero_grad()
    loss, _ = objective.loss(policy(forest, 1.0, False), forest)
    loss.backward()
    return float(loss.detach()), [weight.grad.clone() for weight in policy.parameters() if weight.grad is not None]


def theirs(pair: Pair, forest: Forest, folder: Path) -> tuple[float, list[Tensor]]:
    import trl
    from datasets import Dataset

    batch, token = padded(forest)
    mask = batch["completion_mask"]
    old = forest.token["old_logprobs"][token] * mask
    batch["advantages"] = forest.token["advantages"][token[:, 0]]
    batch |= {"old_per_token_logps": old, "old_logps": old.sum(1), "num_items_in_batch": mask.sum()}
    model, tokenizer = load(folder)
    kind = pair.trainer.removesuffix("Trainer")
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=len(mask),
        num_generations=5,
        max_completion_length=LONGEST,
        temperature=1.0,
        beta=0.0,
        report_to="none",
        disable_tqdm=True,
        **pair.trl,
    )
    rows = Dataset.from_list([{"prompt": "w2"}] * len(mask))
    trainer = getattr(trl, pair.trainer)(model, lambda completions, **_: [0.0] * len(completions), config, rows)
    trainer.processing_class = tokenizer
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return float(loss.detach()), [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two gradients, relative to their largest entry."""
    if [each.shape for each in one] != [each.shape for each in other]:
        raise SystemExit("the two models have gradients of other shapes")
    largest = max(float(each.abs().max()) for each in other)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) / largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    given = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(Case(prompt=4, tokens=LONGEST, prompts=1), Path(name), 1)
        policy = Policy(*load(folder))
        forest = ragged(given.seed, policy.vocabulary)
        print(f"{'':20}{'loss here':>14}{'TRL':>14}{'difference':>12}{'gradient':>12}")
        for what, pair in PAIRS.items():
            ready, objective = prepared(pair, forest, policy, given.seed)
            loss, gradient = ours(ready, objective, policy)
            other, other_gradient = theirs(pair, ready, folder)
            row = {"loss": loss, "trl": other, "gradient": apart(gradient, other_gradient)}
            row["difference"] = 0.0 if pair.on_policy else abs(loss - other)
            found[what] = row
            difference = "-" if pair.on_policy else f"{row['difference']:.1e}"
            print(f"{what:20}{loss:14.7f}{other:14.7f}{difference:>12}{row['gradient']:12.1e}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    far = [what for what, row in found.items() if max(row["difference"], row["gradient"]) > BOUND]
    print(f"further apart than {BOUND:g}: {', '.join(far) or 'none'}")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
