"""`stepcredit credit`: advantages of saved rollouts, without a model."""

from collections.abc import Sequence

from stepcredit.cli import help as help_text
from stepcredit.cli.arguments import output_file, parse
from stepcredit.config import resolve
from stepcredit.config.algorithms import ALGORITHMS
from stepcredit.errors import UserError

HELP = """\
usage: stepcredit credit --in ROLLOUTS --out SCORED --credit.name NAME [--credit.option value ...]

Reads rollouts (.jsonl or .jsonl.zst, one tree a line), computes advantages over the whole file and writes the same
records with "advantages", "weights" and, where there are any, "process", "value" and "pruned" in each segment. Needs
no model.

  --credit.name NAME           a name below, or the dotted path of your own function
  --credit.OPTION value        the function's own options (beta, leave_one_out, gamma, ...)
  --objective.depth-weights X,Y   of segments by depth, from the prompt down
  --objective.aggregate NAME   how "weights" are made; the algorithm's own when not given
  --sampler.max-new-tokens N   the constant that dr_grpo's weights divide by

{algorithms}

Examples
  stepcredit credit --in rollouts.jsonl --out scored.jsonl --credit.name spro --credit.beta 0.05
  stepcredit credit --in runs/grpo-1/rollouts/000010.jsonl.zst --out opo.jsonl --credit.name opo"""


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
    config = resolve({"model": "none", **given})

    from stepcredit.credit import needs_of
    from stepcredit.forest import Forest
    from stepcredit.forest.records import check_columns, read_trees, write_trees
    from stepcredit.run.build import build_credit, build_objective
    from stepcredit.run.metrics import forest_metrics

    function, assign = build_credit(config.credit)
    trees = list(read_trees(own["in"]))
    if not trees:
        raise UserError(f"{own['in']}: holds no rollouts")
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
