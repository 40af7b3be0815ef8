"""Credit functions: `Forest -> advantages [num_tokens]`. One row here for each.

To add one, write a short file beside these and a row below, or name your own by dotted path
(`--credit.name my_package.my_credit`). CONTRIBUTING.md has the steps.
"""

from stepcredit.credit.base import CreditFunction, CreditParts, assign, check_options, credit, needs_of
from stepcredit.credit.gae import gae
from stepcredit.credit.gpg import gpg
from stepcredit.credit.group import dr_grpo, grpo, rloo
from stepcredit.credit.opo import opo
from stepcredit.credit.prime import prime
from stepcredit.credit.prompt import prompt_baseline
from stepcredit.credit.remax import remax
from stepcredit.credit.returns import reinforce_pp, reinforce_pp_baseline, reward_to_go
from stepcredit.credit.spo import spo_tree
from stepcredit.credit.spro import spro
from stepcredit.credit.treerpo import treerpo
from stepcredit.credit.vine import vine

CREDIT: dict[str, CreditFunction] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "reward_to_go": reward_to_go,
    "gpg": gpg,
    "remax": remax,
    "opo": opo,
    "spro": spro,
    "prime": prime,
    "treerpo": treerpo,
    "spo_tree": spo_tree,
    "vine": vine,
    "prompt_baseline": prompt_baseline,
    "gae": gae,
}

__all__ = ["CREDIT", "CreditFunction", "CreditParts", "assign", "check_options", "credit", "needs_of"]
