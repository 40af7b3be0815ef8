"""What a critic adds to an iteration without one, against one forward and backward of the critic, in one run.

Both iterations have the same rollouts; sampling, which is the same, is left out. `share` is (PPO - REINFORCE++) over a
forward and backward of the critic on the same rollouts. With whole returns (lam 1) and one optimiser step the values
are by-products of the pass that trains it, so it should be little above 1: the optimiser step, the targets and the
credit are the rest. A scoring pass comes first in all other cases.

python benchmarks/critic.py [--repeats 9] [--threads N] [--json FILE]
"""

import argparse
import json
import statistics

import torch
from forest import make_policy
from prime import BUDGET, learn, rollouts, timed

from stepcredit.credit import CREDIT, assign
from stepcredit.credit.gae import Returns
from stepcredit.estimators.critic import Critic
from stepcredit.estimators.options import CriticOptions

CASES = {
    "lam 1": (CriticOptions(), Returns(lam=1.0)),
    "lam 1, hl_gauss": (CriticOptions(loss="hl_gauss"), Returns(lam=1.0)),
    "lam 0.95": (CriticOptions(), Returns(lam=0.95)),
    "lam 1, 2 minibatches": (CriticOptions(num_minibatches=2), Returns(lam=1.0)),
    "lam 1, on the policy": (CriticOptions(backbone="policy"), Returns(lam=1.0)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the numbers here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    policy, forest = make_policy(), rollouts()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    passes = Critic(policy, CriticOptions(), Returns())

    def without() -> None:
        learn(policy, optimizer, assign(forest, "reinforce_pp", CREDIT["reinforce_pp"], {}))

    def once() -> None:
        for part in passes.policy.parts(forest, BUDGET):
            passes.policy(part, head="value").sum().backward()
        passes.policy.zero_grad()

    results = {}
    print(f"seconds, medians of {given.repeats}; {given.threads} threads")
    print(f"{'critic':22}{'without':>9}{'PPO':>9}{'once':>9}{'share':>8}")
    for name, (options, returns) in CASES.items():
        critic = Critic(policy, options, returns, max_tokens=BUDGET)
        credit = {"lam": returns.lam, "whiten": True}

        def ppo(critic: Critic = critic, credit: dict = credit) -> None:
            learn(policy, optimizer, assign(critic.observe(forest), "gae", CREDIT["gae"], credit))

        runs = {"without": without, "ppo": ppo, "once": once}
        taken = [{key: timed(run) for key, run in runs.items()} for _ in range(given.repeats + 1)][1:]
        found = {key: statistics.median(row[key] for row in taken) for key in runs}
        found["share"] = statistics.median((row["ppo"] - row["without"]) / row["once"] for row in taken)
        results[name] = found
        print(
            f"{name:22}{found['without']:9.3f}{found['ppo']:9.3f}{found['once']:9.3f}{found['share']:8.2f}", flush=True
        )
    if given.json:
        with open(given.json, "w", encoding="utf-8") as out_file:
            json.dump({"threads": given.threads, "cases": results}, out_file, indent=1)


if __name__ == "__main__":
    main()
