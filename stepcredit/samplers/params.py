"""How tokens are drawn; the same words mean the same for every sampler."""

from typing import NamedTuple

from pydantic import ConfigDict, Field

from stepcredit.section import Ids, Section


class SamplingParams(Section):
    model_config = ConfigDict(frozen=True)

    temperature: float = Field(1.0, ge=0)  # logits are divided by it; 0 takes the most likely token
    top_k: int = Field(0, ge=0)  # the k most likely tokens, and those as likely as the last of them; 0 keeps all
    top_p: float = Field(1.0, gt=0, le=1)  # of these the smallest set with at least this probability; 1 keeps all
    max_new_tokens: int = Field(128, ge=1)  # a completion that has not stopped by then is truncated (finish "length")
    stop_token_ids: Ids = None  # ids that end a completion; None: the model's own

    @property
    def truncates(self) -> bool:
        """True when tokens are drawn from less than the full distribution."""
        return self.top_p < 1.0 or self.top_k > 0


class Stream(NamedTuple):
    """The random numbers that a completion draws from, where it is sampled alone or goes on.

    Attributes:
        number, of: it is completion `number` of `of` that have one seed.
        used: tokens that it has already.
    """

    number: int
    of: int
    used: int = 0
