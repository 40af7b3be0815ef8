"""AuxModels: they observe a forest and add columns to it before credit is assigned."""

from stepcredit.auxiliary.base import AuxModel
from stepcredit.auxiliary.frozen import Base, OldPolicy, Reference, SameAsOld, fingerprint
from stepcredit.auxiliary.prm import ImplicitPRM, PRMOptions

__all__ = ["AuxModel", "Base", "ImplicitPRM", "OldPolicy", "PRMOptions", "Reference", "SameAsOld", "fingerprint"]
