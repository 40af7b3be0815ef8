"""The return of one greedy completion of each problem, a baseline that no sample enters."""

import torch

from stepcredit.credit.base import completions
from stepcredit.errors import UserError
from stepcredit.estimators.base import Context, Estimator, provider
from stepcredit.forest import Forest
from stepcredit.forest.types import Segment, Tree
from stepcredit.growth.rollouts import Rollouts
from stepcredit.samplers.base import rest
from stepcredit.shaping.choose import warn_of_raw_values


class GreedyReturn(Estimator):
    """Adds the token column `greedy_return`: what the likeliest completion of each token's problem gets.

    Where that one could not be judged it is 0, and the completions of the problem are left out of the loss.
    It is sampled at temperature 0 with the weights of the iteration, one for each tree, each process its share. Nobody
    trains on it; its tokens are the metric `tokens/greedy`, and are counted in `tokens/sampled`.
    """

    def __init__(self, rollouts: Rollouts) -> None:
        super().__init__()
        self.rollouts = rollouts
        self.params = rollouts.params.model_copy(update={"temperature": 0.0, "top_k": 0, "top_p": 1.0})

    def observe(self, forest: Forest) -> Forest:
        ranks = self.rollouts.ranks
        mine = ranks.share(range(forest.num_trees))
        parts = ranks.gather(self._returns(forest, mine) if mine else [])
        found = torch.full((forest.num_trees,), torch.nan)
        lengths = 0
        for tree, value, length in (row for part in parts for row in part):
            found[tree] = torch.nan if value is None else value
            lengths += length
        judged = found[~found.isnan()]
        self.metrics = {
            "reward/greedy": float(judged.mean()) if len(judged) else 0.0,
            "reward/greedy_judged": len(judged) / max(1, len(found)),
            "tokens/greedy": float(lengths),
        }
        forest = forest.with_token(greedy_return=found.nan_to_num(0.0)[forest.token_tree])
        if len(judged) == len(found):
            return forest
        return forest.with_segment(mask=forest.segment["mask"] & ~found.isnan()[forest.segment["tree"]])

    def _returns(self, forest: Forest, mine: list[int]) -> list[tuple[int, float | None, int]]:
        """For each of these trees its number, the return of its greedy completion, and how long that is."""
        rollouts = self.rollouts
        starts, sizes = forest.tree["prompt_start"].tolist(), forest.tree["prompt_length"].tolist()
        prompts = [forest.prompt_ids[starts[tree] : starts[tree] + sizes[tree]].tolist() for tree in mine]
        groups = rollouts.sampler.sample(prompts, 1, self.params, [0] * len(mine))
        rest(rollouts.sampler)
        trees = [
            Tree(forest.problems[tree], prompt, [Segment(group[0].token_ids, finish=group[0].finish)])
            for tree, prompt, group in zip(mine, prompts, groups, strict=True)
        ]
        rows = completions(rollouts.judge(Forest.from_trees(trees)))
        returns = dict(zip(rows.tree.tolist(), rows.returns.tolist(), strict=True))
        return [
            (tree, returns.get(place), len(group[0].token_ids))
            for place, (tree, group) in enumerate(zip(mine, groups, strict=True))
        ]


@provider()
def greedy_return(context: Context) -> GreedyReturn:
    """
    Raises:
        UserError: nothing is sampled here.
    """
    if context.rollouts is None:
        raise UserError("greedy_return: a greedy completion has to be sampled, which only a run does")
    if context.config.growth.name != "flat":
        raise UserError(
            f"growth.name {context.config.growth.name}: the greedy completion of a problem is a plain one (growth.name "
            "flat); take another credit"
        )
    warn_of_raw_values(context.config, "returns of greedy completions")
    return GreedyReturn(context.rollouts)
