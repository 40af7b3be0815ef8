"""How tokens are drawn; the same words mean the same for every sampler."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """
    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: keep the k most likely tokens and those as likely as the last of them (0 keeps all).
        top_p: keep the smallest set of tokens with at least this probability among those that top_k left (1 keeps all).
        max_new_tokens: a completion that has not stopped by then is truncated (finish "length").
        stop_token_ids: ids that end a completion; None takes the model's own.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 128
    stop_token_ids: tuple[int, ...] | None = None

    @property
    def truncates(self) -> bool:
        """True when tokens are drawn from less than the full distribution."""
        return self.top_p < 1.0 or self.top_k > 0
