"""PRIME inside TRL: the implicit process reward model (`estimators/prm.py`) that learns beside TRL's policy."""

import copy
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers.initialization import no_init_weights

from stepcredit.config import resolve
from stepcredit.errors import UserError
from stepcredit.estimators.frozen import Reference
from stepcredit.estimators.options import PRMOptions
from stepcredit.estimators.prm import ImplicitPRM, beta_of
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.learn.placement import Placement, load_full_state
from stepcredit.policy.forward import Policy, choose_scoring_form
from stepcredit.policy.loading import load_policy, policy_of, save_policy
from stepcredit.policy.weights import load_network
from stepcredit.processes.ranks import Ranks

FOLDER = "prm"  # inside a checkpoint of TRL
STATE = "training_state.pt"
WHOLE_MODELS = ("NO", "MULTI_CPU", "MULTI_GPU")  # kinds of processes of accelerate that have a whole model each


class Rollouts(NamedTuple):
    """Padded completions of all processes, on the CPU.

    Attributes:
        groups: [N] number of the group.
        prompt_ids, prompt_mask: [N, P].
        completion_ids: [N, T].
        present: [N, T] True for tokens, whoever wrote them; False for padding.
        sampled: [N, T] True for those that the policy sampled.
        rewards: [N] outcomes; nan: not judged.
        masked: [N] True for completions that nothing is learnt from.
    """

    groups: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    present: Tensor
    sampled: Tensor
    rewards: Tensor
    masked: Tensor


class RewardModel:
    """The process reward model of a trainer, whole on every process, the same on all.

    It learns from all completions of a generation batch, whichever process sampled them; the passes are shared out.

    Args:
        model: TRL's policy, before anything was learnt.
        credit, function, credit_options: the credit function that reads it; `beta` is its.
        given: options of `prm.*` (`estimators/options.py`), and `max_tokens_per_micro_batch`.
        args: of TRL.

    Attributes:
        prm: the model, with its `Learner`.
        reference: what it began as, frozen; None where the policy itself is the reference.

    Raises:
        UserError: an option is unknown, or it does not go with the trainer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        credit: str,
        function: Callable[..., Any],
        credit_options: Mapping[str, Any],
        given: Mapping[str, Any],
        args: Any,
        accelerator: Accelerator,
    ) -> None:
        self.credit, self.accelerator = credit, accelerator
        self.options, max_tokens = _options(given)
        if accelerator.distributed_type.value not in WHOLE_MODELS:
            raise UserError(
                f"credit '{credit}' keeps its process reward model whole on every process, which was not tried beside "
                f"{accelerator.distributed_type.value}; take DDP, or 'stepcredit train --algorithm prime'"
            )
        if self.options.reference == "policy" and args.temperature != 1:
            raise UserError(
                f"prm reference 'policy' needs temperature 1, as the process reward model has, not {args.temperature:g}"
            )
        placement = Placement(Ranks.of_group(), device=accelerator.device)
        start = self._start(model, tokenizer, args)
        if args.gradient_checkpointing:
            start.checkpoint_layers()
        beta = beta_of(function, credit_options)
        self.reference = Reference(start, 1.0, max_tokens, placement) if self.options.reference == "start" else None
        self.prm = ImplicitPRM(start, self.options, beta, max_tokens, args.seed, placement)
        self.ranks = placement.ranks
        self.settings = {"beta": beta, "reference": self.options.reference, "model": self.options.model}

    @property
    def metrics(self) -> dict[str, float]:
        """`prm/...` of the last batch."""
        return self.prm.metrics

    def _start(self, model: Any, tokenizer: Any, args: Any) -> Policy:
        name, device = self.options.model, self.accelerator.device
        if name is None:
            if is_peft_model(model):
                raise UserError(
                    f"credit '{self.credit}' would copy the policy, whose adapters it cannot train; name the model it "
                    "starts from: prm={'model': 'folder or hub id'}"
                )
            own = _unpatched_copy(model).to(device)
            start = policy_of(own, tokenizer, torch.bfloat16 if args.bf16 else None, "the policy")
            choose_scoring_form(start)
            return start
        start = load_policy(name, str(device), "bfloat16" if args.bf16 else "float32", option="prm.model")
        if start.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise UserError(f"prm.model: '{name}' has another vocabulary than the policy")
        return start

    # ------------------------------------------------------------------ what a batch gives and teaches

    def columns(
        self,
        output: Mapping[str, Any],
        sampled: Tensor,
        rewards: Tensor,
        masked: Tensor,
        old_logprobs: Tensor | None,
        group_size: int,
        learns: bool,
    ) -> dict[str, Tensor]:
        """`prm_logprobs` and `ref_logprobs`, [N, T] each, of the completions of all processes.

        Args:
            output: a batch of TRL, of this process.
            sampled: [B, T] 1 for the tokens that the policy sampled.
            rewards: [N] of all processes; nan: not judged.
            masked: [B] True for completions that it is not to learn from.
            old_logprobs: [B, T] of the policy at temperature 1, the reference where there is no other.
            learns: whether it learns from the batch; its options say whether before or after giving its numbers.

        Raises:
            UserError: a reward outside [0, 1], images, or the memory does not hold a completion.
        """
        if "pixel_values" in output:
            raise UserError(
                f"credit '{self.credit}': its process reward model reads text alone, and the prompts have images"
            )
        rows = Rollouts(
            torch.arange(len(rewards)) // group_size,
            self._gather(output["prompt_ids"], pad_first=True),
            self._gather(output["prompt_mask"], pad_first=True).bool(),
            self._gather(output["completion_ids"]),
            self._gather(output["completion_mask"]).bool(),
            self._gather(sampled).bool(),
            rewards.cpu().float(),
            self._gather(masked),
        )
        self._check_outcomes(rows.rewards)
        forest, cells = forest_of(rows)
        if self.reference is not None:
            forest = self.reference.observe(forest)
        else:
            assert old_logprobs is not None
            forest = forest.with_token(ref_logprobs=self._gather(old_logprobs).float().flatten()[cells])
        with torch.enable_grad():
            forest = self.prm.observe(forest) if learns else self.prm.judge(forest)
        none = torch.zeros(rows.sampled.numel())
        return {
            name: none.index_copy(0, cells, forest.token[name]).view(rows.sampled.shape).to(sampled.device)
            for name in ("prm_logprobs", "ref_logprobs")
        }

    def _gather(self, rows: Tensor, pad_first: bool = False) -> Tensor:
        if rows.dim() > 1:
            rows = self.accelerator.pad_across_processes(rows.contiguous(), dim=1, pad_first=pad_first)
        gathered: Tensor = self.accelerator.gather(rows)
        return gathered.cpu()

    def _check_outcomes(self, rewards: Tensor) -> None:
        outside = ((rewards < 0) | (rewards > 1)).nonzero()
        if len(outside):
            row = int(outside[0])
            raise UserError(
                f"credit '{self.credit}': completion {row} has the reward {float(rewards[row]):.4g}, and its process "
                "reward model learns from outcomes in [0, 1]; scale the reward functions with reward_weights"
            )

    # ------------------------------------------------------------------ checkpoints

    def save(self, folder: str | Path) -> None:
        """Write the model as a folder that `from_pretrained` loads, with what a resumed run needs beside it."""
        if not self.ranks.main:
            return
        folder = Path(folder)
        save_policy(self.prm.policy, folder)
        state = {
            "settings": self.settings,
            "optimizer": self.prm.learner.optimizer.state_dict(),
            "prm": self.prm.state_dict(),
            "reference": self.reference.state_dict() if self.reference else None,
        }
        torch.save(state, folder / STATE)

    def load(self, folder: str | Path) -> None:
        """The inverse of `save`, on every process. The learning rate and so on are those of this run.

        Raises:
            UserError: there is none, it is of a run with other settings, or the reference would be another model.
        """
        folder = Path(folder)
        if not (folder / STATE).is_file():
            raise UserError(
                f"resume_from_checkpoint: '{folder}' holds no process reward model ({STATE}); the checkpoint is of a "
                f"run without credit '{self.credit}', or was saved with save_only_model"
            )
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        for name, value in self.settings.items():
            if state["settings"][name] != value:
                raise UserError(
                    f"resume_from_checkpoint: '{folder}' was trained with {name} {state['settings'][name]}, not {value}"
                )
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])
        load_full_state(self.prm.policy, load_network(str(folder), "resume_from_checkpoint").state_dict())
        learner, options = self.prm.learner, self.options
        learner.optimizer.load_state_dict(state["optimizer"])
        learner.set(lr=options.learning_rate, betas=options.betas, weight_decay=options.weight_decay)
        self.prm.load_state_dict(state["prm"])


def _options(given: Mapping[str, Any]) -> tuple[PRMOptions, int]:
    """The options, and the token positions of a micro-batch."""
    own, budget = dict(given), "max_tokens_per_micro_batch"
    optim = {budget: own.pop(budget)} if budget in own else {}
    config = resolve(
        {"model": "TRL's", "optim": optim, "prm": own}
    )  # no model of ours, whose recipe has other defaults
    return config.prm, config.optim.max_tokens_per_micro_batch


def _unpatched_copy(model: Any) -> Any:
    """A model like this with fp32 weights of its own, without what TRL has put into the forward of this one."""
    with torch.random.fork_rng(), no_init_weights():
        made = type(model)(copy.deepcopy(model.config)).float()
    made.tie_weights()
    made.load_state_dict(model.state_dict())
    made.generation_config = copy.deepcopy(model.generation_config)
    return made


def forest_of(rows: Rollouts) -> tuple[Forest, Tensor]:
    """The completions that have a sampled token, with their prompts; and the cell of [N, T] of each token.

    Completions of a group whose prompts differ are in trees of their own. What follows the last sampled token is left
    out: nothing depends on it.
    """
    members: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for row, group in enumerate(rows.groups.tolist()):
        if bool(rows.sampled[row].any()):
            ids = rows.prompt_ids[row][rows.prompt_mask[row]].tolist()
            members.setdefault((group, tuple(ids)), []).append(row)
    trees, cells = [], [torch.zeros(0, dtype=torch.long)]
    for (group, prompt), numbers in members.items():
        segments: list[Segment] = []
        for row in numbers:
            last = int(rows.sampled[row].nonzero().max())
            places = rows.present[row, : last + 1].nonzero().squeeze(1)
            cells.append(row * rows.sampled.shape[1] + places)
            segments += _completion(rows, row, places, len(segments))
        trees.append(Tree(Problem(id=f"group {group}"), prompt, segments))
    return Forest.from_trees(trees), torch.cat(cells)


def _completion(rows: Rollouts, row: int, places: Tensor, first: int) -> list[Segment]:
    """The segments of a completion, one for each run of tokens that are sampled, or not; `first` is the first's row."""
    pairs = zip(rows.sampled[row, places].tolist(), rows.completion_ids[row, places].tolist(), strict=True)
    runs = [(sampled, [token for _, token in run]) for sampled, run in groupby(pairs, key=lambda pair: pair[0])]
    made = [
        Segment(ids, parent=first + number - 1 if number else -1, sampled=sampled, finish="cut")
        for number, (sampled, ids) in enumerate(runs)
    ]
    reward, leaf = float(rows.rewards[row]), made[-1]
    leaf.finish, leaf.reward = "stop", None if reward != reward else reward
    leaf.masked = bool(rows.masked[row])
    return made
