"""`stepcredit credit`: advantages of saved rollouts, without a model."""

import logging
from collections.abc import Callable, Sequence

from stepcredit.cli import help as help_text
from stepcredit.cli.arguments import output_file, parse
from stepcredit.config import resolve
from stepcredit.config.algorithms import ALGORITHMS
from stepcredit.errors import UserError

HELP = """\
usage: stepcredit credit --in ROLLOUTS --out SCORED --credit.name NAME [--credit.option value ...]

Reads rollouts (.jsonl or .jsonl.zst, one tree a line; or what TRL and verl log, docs/data.md), computes advantages over
the whole file and writes the same records with "advantages", "weights" and, where there are any, "process", "value" and
"pruned" in each segment. Needs no model.

  --credit.name NAME           a name below, or the dotted path of your own function
  --credit.OPTION value        the function's own options (beta, leave_one_out, gamma, ...)
  --objective.depth-weights X,Y   of segments by depth, from the prompt down
  --objective.aggregate NAME   how "weights" are made; the algorithm's own when not given
  --model MODEL                whose tokenizer encodes the texts of TRL and verl; their bytes are tokens when not given
  --reward.functions A,B       TRL's columns of rewards, all columns of numbers when not given; --reward.weights X,Y
  --sampler.max-new-tokens N   the constant that dr_grpo's weights divide by

{algorithms}

Examples
  stepcredit credit --in rollouts.jsonl --out scored.jsonl --credit.name spro --credit.beta 0.05
  stepcredit credit --in runs/grpo-1/rollouts/000010.jsonl.zst --out opo.jsonl --credit.name opo"""


def encoder(model: str, trust_remote_code: bool) -> Callable[[str], list[int]]:
    """Text to the token ids of a model, as they stand in a text that is rendered already."""
    from transformers import AutoTokenizer

    from stepcredit.policy.loading import source_of

    try:
        tokenizer = AutoTokenizer.from_pretrained(source_of(model), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model: cannot load the tokenizer of '{model}' ({str(error).strip().splitlines()[0]})"
        ) from error
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        print(HELP.format(algorithms=help_text.algorithms()))
        return 0
    given, own = parse(words, {"in": None, "out": None}, "credit")
    if "in" not in own:
        raise UserError("--in FILE is missing; see 'stepcredit credit --help'")
    out = output_file(own)
    if out is None:
        raise UserError("--out FILE is missing; see 'stepcredit credit --help'")
    name = given.get("credit", {}).get("name")
    if name in ALGORITHMS and "algorithm" not in given:
        given["algorithm"] = name
        given["credit"] |= {"name": ALGORITHMS[name].credit}  # of ppo that is gae
    config = resolve({"model": "none", **given})

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from stepcredit.credit import needs_of
    from stepcredit.credit.choose import build_credit
    from stepcredit.forest import Forest
    from stepcredit.forest.records import check_columns, write_trees
    from stepcredit.losses.choose import build_objective
    from stepcredit.run.metrics import forest_metrics
    from stepcredit.tasks.rollouts import read_rollouts

    function, assign = build_credit(config.credit)
    encode = encoder(config.model, config.trust_remote_code) if "model" in given else None
    reward = config.reward
    trees, form = read_rollouts(own["in"], encode, {}, reward.functions, reward.weights)
    if form != "stepcredit" and not any(segment.rewards for tree in trees for segment in tree.segments):
        raise UserError(f"{own['in']}: no column of rewards; give it one with 'stepcredit score --in ... --out ...'")
    check_columns(own["in"], trees, needs_of(function).columns)
    forest = assign(Forest.from_trees(trees))
    forest = forest.with_token(weights=build_objective(config, needs_of(function).forests == "flat").weights(forest))
    beside = out.with_name(f".part-{out.name}")
    write_trees(beside, forest)
    beside.replace(out)
    metrics = forest_metrics(forest)
    sizes = f"{forest.num_trees} trees, {forest.num_segments} segments, {forest.num_tokens} tokens"
    print(f"{config.credit.name}: {sizes} -> {out}")
    for key, value in metrics.items():
        if key.startswith(("tree/", "group/", "value/", "credit/")):
            print(f"  {key:22}{value:.4g}")
    return 0
