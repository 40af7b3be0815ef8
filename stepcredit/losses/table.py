"""The losses by name. One row here for each; name your own by dotted path (`--loss.name my_package.my_loss`)."""

from stepcredit.losses.base import LossFunction
from stepcredit.losses.cispo import cispo
from stepcredit.losses.clip import clip
from stepcredit.losses.gspo import gspo, gspo_token
from stepcredit.losses.pairs import dpo, hinge, ipo
from stepcredit.losses.reinforce import reinforce
from stepcredit.losses.squared import squared

LOSSES: dict[str, LossFunction] = {
    "clip": clip,
    "reinforce": reinforce,
    "cispo": cispo,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "squared": squared,
    "dpo": dpo,
    "ipo": ipo,
    "hinge": hinge,
}
