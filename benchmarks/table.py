"""All benchmarks of speed, one after the other in one run, and then one table of ratios.

python benchmarks/table.py [--only versus shares ...] [--threads N] [--repeats N] [--json FILE]

versus.py needs TRL: `make .venv-bench/installed` makes an environment that has it, `make bench` uses it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Found = dict[str, Any]
Line = tuple[str, str]  # what, and how much


def versus(found: Found) -> Iterator[Line]:
    sizes = {"a": "prompts of 32", "b": "prompts of 256", "c": "prompts of 1,024"}
    for part, what in (("step", "whole step"), ("sampling", "sampling"), ("update", "update"), ("peak", "peak memory")):
        for name, case in found["cases"].items():
            yield f"TRL over stepcredit, {what}, {sizes[name]}", f"{case['trl'][part] / case['stepcredit'][part]:.2f}"


def shares(found: Found) -> Iterator[Line]:
    yield "SPRO step over GRPO step with the same reference pass", f"{found['spro']['ratio']:.3f}"
    dearest = max(found["credit"], key=found["credit"].get)
    yield f"dearest credit function ({dearest}), share of a step", f"{found['credit'][dearest]:.2%}"
    for part, what in (("judge", "judging, share of a step"), ("python", "outside of torch, share of a step, at most")):
        yield what, f"{max(case[part] for case in found['cases'].values()):.1%}"
    for part in ("sampling", "update"):
        values = [case[f"floor_{part}"] for case in found["cases"].values()]
        yield f"{part}, share of the floor", f"{min(values):.0%} to {max(values):.0%}"


def growth(found: Found) -> Iterator[Line]:
    for axis, row in found["axes"].items():
        exponents = "{sampling:.2f}, {update:.2f} ({positions:.2f})".format(**row["exponent"])
        yield f"exponent of {axis}: sampling, update (positions)", exponents


def sampler(found: Found) -> Iterator[Line]:
    for name, case in found["cases"].items():
        yield f"sampling over generate, {name}", f"{case['ratio']:.2f}"


def forest(found: Found) -> Iterator[Line]:
    for name, case in found["cases"].items():
        what = f"update, one row each over forest, {name} (arithmetic)"
        yield what, f"{case['ratio']:.2f} ({case['arithmetic']:.2f})"


def treerpo(found: Found) -> Iterator[Line]:
    for name, forms in found["cases"].items():
        for form in ("stepwise", "tree"):
            ratio = forms["rows"]["iteration"] / forms[form]["iteration"]
            memory = found["mib"][name][form] / found["mib"][name]["rows"]
            what = f"TreeRPO iteration, flat and one row per node over {form}, {name} (memory)"
            yield what, f"{ratio:.2f} ({memory:.0%})"


def prime(found: Found) -> Iterator[Line]:
    for name, order in found["orders"].items():
        yield f"PRIME less RLOO over one pass of its model, {name}", f"{order['share']:.2f}"


def critic(found: Found) -> Iterator[Line]:
    for name, case in found["cases"].items():
        yield f"PPO less REINFORCE++ over one pass of the critic, {name}", f"{case['share']:.2f}"


SCRIPTS: dict[str, Callable[[Found], Iterator[Line]]] = {
    each.__name__: each for each in (versus, shares, growth, sampler, forest, treerpo, prime, critic)
}


def run(name: str, options: list[str], folder: Path) -> Found:
    """A benchmark's own numbers; what it prints goes through."""
    out = folder / f"{name}.json"
    script = Path(__file__).with_name(f"{name}.py")
    subprocess.run([sys.executable, str(script), "--json", str(out), *options], check=True)
    return json.loads(out.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), metavar="NAME")
    parser.add_argument("--threads", help="for all of them")
    parser.add_argument("--repeats", help="for all of them; each has its own otherwise")
    parser.add_argument("--json", type=Path, help="write all numbers and the table here")
    given = parser.parse_args()
    options = [f"--{name}={value}" for name in ("threads", "repeats") if (value := getattr(given, name))]
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name in given.only:
            print(f"\n{name}.py", flush=True)
            found[name] = run(name, options, Path(folder))
    lines = {what: value for name in given.only for what, value in SCRIPTS[name](found[name])}
    print()
    for what, value in lines.items():
        print(f"{what:82}{value:>24}")
    if given.json:
        given.json.write_text(json.dumps({"table": lines, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
