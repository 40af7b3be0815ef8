"""`stepcredit score --prm`: token rewards of saved rollouts, from an implicit process reward model."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stepcredit.config import Config
from stepcredit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def score_prm(config: Config, own: Mapping[str, str], out: Path) -> int:
    """Write rollouts with `prm_logprobs`, `ref_logprobs` and `token_rewards`; print how the rewards fit outcomes."""
    from stepcredit.estimators.prm import prediction_metrics, sums
    from stepcredit.forest import Forest
    from stepcredit.forest.records import read_trees, write_trees
    from stepcredit.policy.forward import score
    from stepcredit.policy.limits import check_positions
    from stepcredit.policy.loading import load_policy

    source = own["in"]
    try:
        beta = float(own["beta"])
    except ValueError as error:
        raise UserError(f"--beta: '{own['beta']}' is not a number") from error
    if not 0 < beta < float("inf"):
        raise UserError(f"--beta must be a number above 0, got {own['beta']}")
    trees = list(read_trees(source))
    if not trees:
        raise UserError(f"{source}: there are no rollouts")
    for tree in trees:
        if not tree.prompt_ids:
            raise UserError(f"{source}: tree '{tree.problem.id}' has no prompt_ids, so its tokens cannot be scored")
    texts = [str(segment.extra.pop("text", "")) for tree in trees for segment in tree.segments]
    forest = Forest.from_trees(trees)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    columns: dict[str, Tensor] = {}
    vocabulary: dict[str, int] = {}
    highest = max(int(forest.token["token_ids"].max()), int(forest.prompt_ids.max()))
    for column, option in (("prm_logprobs", "prm"), ("ref_logprobs", "ref")):
        model = load_policy(
            own[option], config.train.device, config.train.dtype, config.trust_remote_code, option=f"--{option}"
        )
        if highest >= model.vocabulary:
            raise UserError(
                f"{source}: has token id {highest}; the vocabulary of --{option} ends at {model.vocabulary - 1}"
            )
        longest = f"{source}: the longest prompt and completion, of --{option},"
        check_positions(model.positions, int(forest.path_length.max()), longest, "leave them out of --in")
        vocabulary = vocabulary or model.tokenizer.get_vocab()
        if model.tokenizer.get_vocab() != vocabulary:
            raise UserError(f"--{option}: '{own[option]}' has another vocabulary than --prm")
        columns[column] = score(model, forest, 1.0, config.optim.max_tokens_per_micro_batch).logprobs
        if not bool(columns[column].isfinite().all()):
            raise UserError(f"--{option}: '{own[option]}' gives log-probabilities that are not finite")
    rewards = beta * (columns["prm_logprobs"] - columns["ref_logprobs"]) * forest.token_sampled
    write_trees(out, forest.with_token(**columns, token_rewards=rewards), texts=texts if any(texts) else None)
    print(f"{source}: {forest.num_trees} trees, {forest.num_tokens} tokens -> {out}")
    leaf = (forest.segment["is_leaf"] & forest.segment["has_reward"]).nonzero().squeeze(1)
    label = forest.segment["reward"][leaf]
    if forest.is_flat and len(leaf) and bool(((label >= 0) & (label <= 1)).all()):
        for name, value in prediction_metrics(sums(forest, rewards)[leaf], label).items():
            print(f"  {name:18}{value:.4g}")
    return 0
