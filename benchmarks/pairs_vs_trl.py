"""Losses of pairs and demonstrations against TRL's own, from the same file, on one tiny random model.

Both read the rows and make their tokens themselves. TRL's loss is what `DPOTrainer.compute_loss` and
`SFTTrainer.compute_loss` return for one batch of all rows; the reference is another model than the policy, so that
margins are apart. The difference of the losses is relative where they are above 1; the gradient is compared over all
weights, relative to its largest entry. Above `BOUND` the script ends with 1.

python benchmarks/pairs_vs_trl.py [--seed N] [--json FILE]
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
from losses_vs_trl import BOUND, apart
from steps import VOCABULARY, Case, load, make_folder
from torch import Tensor

from stepcredit.config import resolve
from stepcredit.credit.choose import build_credit
from stepcredit.forest import Forest
from stepcredit.growth.recorded import Recorded
from stepcredit.losses.choose import build_objective
from stepcredit.policy.forward import Policy
from stepcredit.tasks.prompts import PromptFormat
from stepcredit.tasks.recorded import load_recorded

ROWS, LONGEST = 12, 12
MOVED = 0.05  # deviation of the noise that makes the reference from the policy


@dataclass(frozen=True)
class Compared:
    """An algorithm with options on top, and TRL's trainer and options for the same."""

    algorithm: str
    trainer: str
    trl: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "dpo": Compared("dpo", "DPOTrainer", {"loss_type": ["sigmoid"], "beta": 0.3}, {"beta": 0.3}),
    "hinge": Compared("dpo", "DPOTrainer", {"loss_type": ["hinge"], "beta": 0.3}, {"name": "hinge", "beta": 0.3}),
    "ipo, averaged": Compared("ipo", "DPOTrainer", {"loss_type": ["ipo"], "beta": 0.3}, {"beta": 0.3, "average": True}),
    "sft": Compared("sft", "SFTTrainer", {"completion_only_loss": True, "loss_type": "nll"}),
}


def write_rows(folder: Path, seed: int) -> dict[str, Path]:
    """Pairs of unlike lengths, and their chosen sides as demonstrations."""
    generator = torch.Generator().manual_seed(seed)

    def text(most: int) -> str:
        size = int(torch.randint(1, most + 1, (), generator=generator))
        return " ".join(f"w{one}" for one in torch.randint(2, VOCABULARY, (size,), generator=generator).tolist())

    rows = [{"prompt": text(6), "chosen": f" {text(LONGEST)}", "rejected": f" {text(LONGEST)}"} for _ in range(ROWS)]
    right = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    paths = {}
    for kind, each in (("pairs", rows), ("demonstrations", right)):
        paths[kind] = folder / f"{kind}.jsonl"
        paths[kind].write_text("".join(json.dumps(row) + "\n" for row in each), encoding="utf-8")
    return paths


def moved_copy(folder: Path, to: Path, seed: int) -> Path:
    """The model of a folder with noise on every weight, beside the same tokenizer."""
    model, tokenizer = load(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += MOVED * weight.std().nan_to_num(0.1) * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


def ours(case: Compared, data: Path, folder: Path, reference: Path) -> tuple[float, list[Tensor]]:
    config = resolve({"algorithm": case.algorithm, "model": "tiny", "loss": dict(case.loss)})
    policy = Policy(*load(folder))
    rows = Recorded(PromptFormat(policy.tokenizer), policy.stop_token_ids, 10 * LONGEST)
    forest = Forest.from_trees([rows.tree(row) for row in load_recorded(config.growth.name, str(data), "train")])
    with torch.no_grad():
        forest = forest.with_token(ref_logprobs=Policy(*load(reference))(forest).logprobs)
    objective = build_objective(config, flat=True)
    forest = build_credit(config.credit)[1](forest)
    forest = forest.with_token(weights=objective.weights(forest))
    loss, _ = objective.loss(policy(forest), forest)
    loss.backward()
    return float(loss.detach()), [weight.grad.clone() for weight in policy.parameters() if weight.grad is not None]


def theirs(case: Compared, data: Path, folder: Path, reference: Path) -> tuple[float, list[Tensor]]:
    import trl
    from datasets import Dataset

    model, tokenizer = load(folder)
    given = {"ref_model": load(reference)[0]} if case.trainer == "DPOTrainer" else {}
    config = getattr(trl, case.trainer.replace("Trainer", "Config"))(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=ROWS,
        max_length=None,
        report_to="none",
        disable_tqdm=True,
        **case.trl,
    )
    rows = Dataset.from_list([json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()])
    trainer = getattr(trl, case.trainer)(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, **given
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return float(loss.detach()), [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    given = parser.parse_args()
    compared: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(Case(prompt=4, tokens=LONGEST, prompts=1), Path(name), 1)
        data = write_rows(folder, given.seed)
        reference = moved_copy(folder, folder / "reference", given.seed)
        print(f"{'':20}{'loss here':>14}{'TRL':>14}{'difference':>12}{'gradient':>12}")
        for what, case in CASES.items():
            rows = data["demonstrations" if case.algorithm == "sft" else "pairs"]
            loss, gradient = ours(case, rows, folder, reference)
            other, other_gradient = theirs(case, rows, folder, reference)
            row = {"loss": loss, "trl": other, "difference": abs(loss - other) / max(1.0, abs(other))}
            row["gradient"] = apart(gradient, other_gradient)
            compared[what] = row
            numbers = f"{loss:14.7f}{other:14.7f}{row['difference']:12.1e}{row['gradient']:12.1e}"
            print(f"{what:20}{numbers}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(compared, indent=1) + "\n", encoding="utf-8")
    far = [what for what, row in compared.items() if not max(row["difference"], row["gradient"]) <= BOUND]
    print(f"further apart than {BOUND:g}: {', '.join(far) or 'none'}")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
