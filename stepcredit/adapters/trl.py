"""TRL's `GRPOTrainer` with the credit functions of this package, an advantage for every token.

    from stepcredit.adapters.trl import CreditGRPOTrainer

    trainer = CreditGRPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", reward_funcs=reward, args=GRPOConfig(...),
                                train_dataset=dataset, credit="spro", credit_options={"beta": 0.05})

TRL samples, judges, computes log-probabilities and the loss as always; its advantages alone are replaced. See
docs/trl.md. Tested with TRL 1.16, whose private methods it overrides: a name that is gone is an error.
"""

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from stepcredit.adapters.rows import credit_parts, flat_credit
from stepcredit.adapters.token_rewards import TokenRewards, token_rewards
from stepcredit.adapters.trl_prm import FOLDER, RewardModel
from stepcredit.credit.base import CreditFunction, needs_of
from stepcredit.errors import UserError

TESTED = "1.16"

try:
    import trl
    from trl import GRPOConfig, GRPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.utils import use_adapter
except ImportError as error:
    raise UserError(f"the adapter of TRL needs TRL {TESTED} (pip install 'stepcredit[trl]'): {error}") from error

__all__ = ["CreditGRPOTrainer", "TokenRewards", "token_rewards"]

log = logging.getLogger("stepcredit")

# What a forward of TRL takes beside the tokens, by the names that it has in a batch, too.
EXTRA_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
METHODS = {
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("inputs",),
    "_get_per_token_logps_and_entropies": (
        *("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
        *EXTRA_INPUTS,
    ),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_load_optimizer_and_scheduler": ("checkpoint",),
}
ATTRIBUTES = (
    "_logs",
    "_metrics",
    "_tokenizer",
    "accelerator",
    "beta",
    "eos_token_ids",
    "log_completions",
    "mask_truncated_completions",
    "num_generations",
    "num_generations_eval",
    "ref_model",
    "reward_funcs",
    "reward_func_names",
    "reward_weights",
)
OUTPUTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch")
COLUMNS = ("old_logprobs", "ref_logprobs", "token_rewards", "token_ids", "prm_logprobs")
MAX_PARTS = 16  # numbers of a completion in the table of completions


class _Scored(NamedTuple):
    """What TRL passed to and got from the reward functions: [N, F] of all processes, and the tokens of this one's."""

    rewards: Tensor
    completion_ids: list[list[int]]


class CreditGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with a credit function of this package; all other arguments are TRL's.

    Metrics: `credit/outcome_rms` and `credit/process_rms` (root mean square over trained tokens), `credit/zero_groups`
    (share of groups in which every trained token has advantage 0) and `credit/unscored` (share of completions for
    which every reward function returned None; they are in no baseline and get 0). With `log_completions` the table has
    the column `token_advantages`, and its advantage is the mean over the tokens.

    A credit that reads `prm_logprobs`, such as `prime`, has a process reward model that learns beside the policy; it is
    in TRL's checkpoints, and its metrics are `prm/...`.

    Args:
        credit: name of a credit function of completions, or `module.function` or `file.py:function` of your own.
        credit_options: its options.
        prm: options of the process reward model, those of `prm.*` in a config of this package.

    Attributes:
        reward_model: the process reward model (`RewardModel`); None where the credit reads none.

    Raises:
        UserError: the credit does not exist, is one of trees, reads what TRL does not have, has other options, or
            does not go with an option of `args`; TRL lacks what this class overrides.
    """

    _tag_names = [*getattr(GRPOTrainer, "_tag_names", []), "stepcredit"]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *others: Any,
        credit: str = "spro",
        credit_options: Mapping[str, Any] | None = None,
        prm: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> None:
        _check_methods()
        self.credit, self.credit_options = credit, dict(credit_options or {})
        function = _supported(credit, self.credit_options)
        self.needs = needs_of(function).columns
        judged = "prm_logprobs" in self.needs
        if prm is not None and not judged:
            raise UserError(f"prm: credit '{credit}' reads no process reward model; leave prm out")
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = GRPOConfig(f"{name.rstrip('/').split('/')[-1]}-GRPO")
        _check_options(credit, args)
        beta = args.beta
        try:
            # TRL makes a reference only for its KL term; it is made the same way for the credit alone.
            args.beta = beta or float("ref_logprobs" in self.needs and not judged)
            super().__init__(model, reward_funcs, args, *others, **named)
        finally:
            args.beta = beta
        self.beta = beta
        missing = [name for name in ATTRIBUTES if not hasattr(self, name)]
        if missing:
            raise UserError(_gone(f"GRPOTrainer.{missing[0]}"))
        if self.accelerator.is_main_process:
            _tell(credit, judged, args)
        self._scored: _Scored | None = None
        self.reward_model: RewardModel | None = None
        if judged:
            own = (self.credit_options, prm or {}, args, self.accelerator)
            self.reward_model = RewardModel(self.model, self._tokenizer, credit, function, *own)

    # ------------------------------------------------------------------ what TRL calls

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored = _Scored(rewards, completion_ids_list)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        masks_truncated: bool = self.mask_truncated_completions  # type: ignore[has-type]
        self.mask_truncated_completions = False  # their tokens count in baselines; they are masked afterwards
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self.mask_truncated_completions = masks_truncated
        missing = [name for name in OUTPUTS if name not in output]
        if missing or self._scored is None:
            raise UserError(_gone(f"'{missing[0]}' of a batch" if missing else "the call of _calculate_rewards"))
        rewards, columns = self._rewards(output), self._columns(output)
        mask = _mask(output)
        kept = self._ended(mask.device) if masks_truncated else torch.ones_like(mask[:, 0])
        read = self._judged(output, mask, rewards, kept, columns)
        if masks_truncated:
            self._mask_truncated(output, kept)
        self._replace_advantages(output, rewards, mask, columns, read)
        self._scored = None
        return output

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.reward_model is not None:
            self.reward_model.save(Path(output_dir) / FOLDER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.reward_model is not None and checkpoint is not None:
            self.reward_model.load(Path(checkpoint) / FOLDER)

    # ------------------------------------------------------------------ what the credit function reads

    def _rewards(self, output: dict[str, Any]) -> Tensor:
        """[N] of all processes: the weighted sum over the functions that judge whole completions; nan if none did."""
        assert self._scored is not None
        rewards = self._scored.rewards
        of_completions = torch.tensor([not isinstance(one, TokenRewards) for one in self.reward_funcs])
        weights = torch.where(of_completions, self.reward_weights.cpu(), 0.0).to(rewards.device)
        total = (rewards * weights).nansum(1)
        return torch.where(rewards.isnan().all(1), torch.nan, total)

    def _columns(self, output: dict[str, Any]) -> dict[str, Tensor]:
        """[B, T] each, of this process."""
        columns = {"token_ids": output["completion_ids"]}
        judge = self.reward_model
        if "old_logprobs" in self.needs or (judge is not None and judge.reference is None):
            old = output.get("old_per_token_logps")
            columns["old_logprobs"] = self._logprobs(self.model, output) if old is None else old
        if "ref_logprobs" in self.needs and judge is None:
            reference = output.get("ref_per_token_logps")
            columns["ref_logprobs"] = self._reference_logprobs(output) if reference is None else reference
        if any(isinstance(one, TokenRewards) for one in self.reward_funcs):
            columns["token_rewards"] = self._token_rewards(output)
        return columns

    def _judged(
        self, output: dict[str, Any], mask: Tensor, rewards: Tensor, kept: Tensor, columns: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the process reward model gives, [N, T] each of all processes. It learns in training alone."""
        if self.reward_model is None:
            return {}
        training = self.model.training
        group_size = self.num_generations if training else self.num_generations_eval
        old = columns.get("old_logprobs")
        read = self.reward_model.columns(output, mask, rewards, kept == 0, old, group_size, learns=training)
        metrics = self._metrics["train" if training else "eval"]
        for name, value in self.reward_model.metrics.items():
            metrics[name].append(value)
        return read

    def _logprobs(self, model: Any, output: dict[str, Any]) -> Tensor:
        """[B, T] log-probabilities of the completions, by TRL's own forward."""
        args = self.args
        rows = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            logprobs: Tensor = self._get_per_token_logps_and_entropies(
                model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], 1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], 1),
                output["completion_ids"].size(1),
                batch_size=rows,
                **{name: output[name] for name in EXTRA_INPUTS if name in output},
            )[0]
        return logprobs

    def _reference_logprobs(self, output: dict[str, Any]) -> Tensor:
        """Of the reference that TRL made: a second model, a copy of the adapter, or the model without its adapter."""
        if self.ref_model is not None:
            return self._logprobs(self.ref_model, output)
        model = self.accelerator.unwrap_model(self.model)
        if not is_peft_model(model):
            raise UserError(f"credit '{self.credit}' reads a reference model, and this trainer has none")
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self._logprobs(self.model, output)

    def _token_rewards(self, output: dict[str, Any]) -> Tensor:
        """[B, T] the weighted sum of what functions gave to single tokens."""
        assert self._scored is not None
        total = torch.zeros(output["completion_ids"].shape)
        for function, weight in zip(self.reward_funcs, self.reward_weights.tolist(), strict=True):
            if isinstance(function, TokenRewards):
                for row, values in enumerate(function.last):
                    if values:
                        total[row, : len(values)] += weight * torch.tensor(values)
        total = total.to(output["completion_ids"].device)
        elsewhere = (total * (1 - _mask(output))).nonzero().tolist()
        if elsewhere:
            row, token = elsewhere[0]
            raise UserError(
                f"completion {row} has a reward on token {token}, which the policy did not sample (a tool's, or the "
                "environment's): it would be lost; give it to the sampled token before"
            )
        return total

    # ------------------------------------------------------------------ what becomes of it

    def _ended(self, device: torch.device) -> Tensor:
        """[B] 1 for completions with an end, 0 for truncated ones."""
        assert self._scored is not None
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        return torch.tensor([ids[-1] in ends for ids in self._scored.completion_ids], device=device).long()

    def _mask_truncated(self, output: dict[str, Any], kept: Tensor) -> None:
        """Take completions without an end out of the loss and its divisor, as TRL's option says."""
        for name in ("completion_mask", "tool_mask"):
            if name in output:
                output[name] = output[name] * kept[:, None]
        output["num_items_in_batch"] = self.accelerator.gather(_mask(output).sum()).sum()

    def _replace_advantages(
        self, output: dict[str, Any], rewards: Tensor, mask: Tensor, columns: dict[str, Tensor], read: dict[str, Tensor]
    ) -> None:
        """Credit of the groups of all processes, since one may be spread over several; each keeps its own rows.

        Args:
            read: columns of all processes already.
        """
        number, width = mask.shape
        whole = self._gather(mask)
        training = self.model.training
        group_size = self.num_generations if training else self.num_generations_eval
        parts = credit_parts(
            self.credit,
            torch.arange(len(whole)) // group_size,
            whole,
            rewards,
            {name: self._gather(columns[name]) for name in sorted(columns)} | read,
            self.credit_options,
        )
        trained = self._gather(_mask(output)).bool()
        advantages = parts.advantages * trained
        metrics = self._metrics["train" if training else "eval"]
        for name, value in _metrics(advantages, parts.process, trained, rewards, group_size).items():
            metrics[f"credit/{name}"].append(value)
        if self.log_completions:
            self._log_advantages(advantages, trained)
        first = self.accelerator.process_index * number
        output["advantages"] = advantages[first : first + number, :width].to(output["advantages"].dtype)

    def _gather(self, rows: Tensor) -> Tensor:
        """[B, T] of each process to [N, T] of all, padded to the longest."""
        gathered: Tensor = self.accelerator.gather(self.accelerator.pad_across_processes(rows.contiguous(), dim=1))
        return gathered

    def _log_advantages(self, advantages: Tensor, trained: Tensor) -> None:
        """Put these advantages in the place of TRL's in its table of completions."""
        rows = [values[where] for values, where in zip(advantages.cpu(), trained.cpu(), strict=True)]
        table = self._logs["advantages"]
        for _ in range(min(len(rows), len(table))):
            table.pop()
        table.extend(float(row.mean()) if len(row) else 0.0 for row in rows)
        self._logs["extra"]["token_advantages"].extend(map(_compact, rows))


def _mask(output: dict[str, Any]) -> Tensor:
    """[B, T] 1 for the tokens that the policy sampled."""
    mask: Tensor = output["completion_mask"]
    return mask * output["tool_mask"] if "tool_mask" in output else mask


def _metrics(
    advantages: Tensor, process: Tensor | None, trained: Tensor, rewards: Tensor, group_size: int
) -> dict[str, float]:
    outcome = advantages if process is None else advantages - process
    some = (advantages != 0).any(1).view(-1, group_size).any(1)
    metrics = {
        "outcome_rms": _rms(outcome[trained]),
        "zero_groups": float((~some).float().mean()),
        "unscored": float(rewards.isnan().float().mean()),
    }
    return metrics if process is None else metrics | {"process_rms": _rms(process[trained])}


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def _compact(advantages: Tensor) -> str:
    """The advantages of a completion as one number if all are equal, else as the means of up to 16 equal parts."""
    if not len(advantages):
        return "not trained"
    if bool((advantages == advantages[0]).all()):
        return f"{float(advantages[0]):+.3g}"
    return " ".join(f"{float(part.mean()):+.3g}" for part in advantages.tensor_split(min(MAX_PARTS, len(advantages))))


# ---------------------------------------------------------------------- what is refused


def _gone(name: str) -> str:
    return f"TRL {trl.__version__} has no {name}, which this adapter relies on; it was tested with TRL {TESTED}"


def _check_methods() -> None:
    """Raise `UserError` when TRL lacks a method that is overridden or called, or a parameter of it."""
    for name, parameters in METHODS.items():
        method = getattr(GRPOTrainer, name, None)
        if method is None:
            raise UserError(_gone(f"GRPOTrainer.{name}"))
        missing = [each for each in parameters if each not in inspect.signature(method).parameters]
        if missing:
            raise UserError(_gone(f"parameter '{missing[0]}' of GRPOTrainer.{name}"))


def _supported(credit: str, options: Mapping[str, Any]) -> CreditFunction:
    function = flat_credit(credit, options)
    missing = [name for name in needs_of(function).columns if name not in COLUMNS]
    if missing:
        raise UserError(f"credit '{credit}' reads '{missing[0]}'; with TRL there are {', '.join(COLUMNS)}")
    return function


def _check_options(credit: str, args: Any) -> None:
    """Raise `UserError` for an option of TRL that the credit function does not go with."""
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise UserError(
            f"multi_objective_aggregation='{args.multi_objective_aggregation}' scales each reward by itself; credit "
            f"'{credit}' takes their weighted sum: leave the option out"
        )
    if credit != "opo":
        return
    every = args.steps_per_generation * args.num_iterations
    for fits, option, wanted in (
        (args.num_iterations == 1, "num_iterations", "1"),
        (args.gradient_accumulation_steps % every == 0, "steps_per_generation", "a divisor of the accumulation steps"),
        (args.beta == 0.0, "beta", "0"),
        (args.loss_type in ("dapo", "dr_grpo"), "loss_type", "'dapo' or 'dr_grpo', which weigh all tokens alike"),
    ):
        if not fits:
            raise UserError(
                f"credit 'opo' is exactly on-policy: {option} must be {wanted}, not {getattr(args, option)!r}"
            )


def _tell(credit: str, judged: bool, args: Any) -> None:
    if not trl.__version__.startswith(f"{TESTED}."):
        log.warning("TRL is %s; the adapter was tested with %s", trl.__version__, TESTED)
    if args.scale_rewards != "group" and (credit, args.scale_rewards) != ("dr_grpo", "none"):
        log.warning("scale_rewards='%s' is not read: credit '%s' sets the scale", args.scale_rewards, credit)
    if judged and args.save_only_model and args.save_strategy != "no":
        log.warning("save_only_model: checkpoints have no process reward model; trainer.reward_model.save writes it")
