"""How models learn, and how they lie on the processes."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from stepcredit.errors import UserError
from stepcredit.section import Decay, Names, Place, Section, split


class AdamWOptions(Section):
    """Of one model that learns."""

    learning_rate: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.0, ge=0)  # of matrices; norms and biases have none
    betas: Annotated[tuple[Decay, Decay], BeforeValidator(split)] = (0.9, 0.999)
    grad_clip: float = Field(1.0, gt=0)  # largest norm of the gradient
    num_minibatches: int = Field(1, ge=1)  # optimiser steps a batch; trees are shuffled into them


class OptimOptions(AdamWOptions):
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(0, ge=0)  # iterations whose rates rise in equal steps to learning_rate, the first above 0
    num_epochs: int = Field(1, ge=1)
    max_tokens_per_micro_batch: int = Field(16384, ge=1)
    max_nonfinite: int = Field(5, ge=1)  # optimiser steps in a row without a finite gradient, then the run stops


class TextOptions(Section):
    data: Place | None = None  # text file whose next tokens the policy learns in every optimiser step; None: nothing
    coef: float = Field(1.0, gt=0)  # of the mean loss of a token of the text
    tokens: int = Field(2048, ge=2)  # of the text in a step, in whole rows
    length: int = Field(512, ge=2)  # tokens of a row

    def check(self) -> None:
        """Raise `UserError` for options that do not go together."""
        if self.data is None and self != type(self)():
            raise UserError("ptx.coef, tokens and length go with --ptx.data FILE")


class LoraOptions(Section):
    rank: int = Field(0, ge=0)  # of the adapters; 0: none, all weights learn
    alpha: float = Field(32.0, gt=0)  # adapters are scaled by alpha / rank
    targets: Names = []  # linear layers by name, such as q_proj; empty: all but the output layer


class PlacementOptions(Section):
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"  # whole models on each process, or shards; auto: what fits
    cpu_offload: bool = False  # shards and optimiser state in the CPU's memory (fsdp)
    timeout_s: float = Field(1800.0, gt=0)  # a process that does not answer for so long ends the run
