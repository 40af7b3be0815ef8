"""Rewards for form: they say nothing about the answer, so give them a small weight beside one that does."""

import re
from collections.abc import Sequence
from typing import Any

from stepcredit.errors import UserError

OPENED = re.compile(r"<think>\s*(?:</think>\s*)?$")
THINK = re.compile(r"\s*<think>(?!.*<think>)(.*?)</think>(?!.*</think>)\s*\S", re.DOTALL)


def boxed(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 where the completion has exactly one `\\boxed{...}` with something in it."""
    return [float(text.count("\\boxed{") == 1 and "\\boxed{}" not in text) for text in completions]


def think(
    prompts: Sequence[Any], completions: Sequence[str], prompt_end: Sequence[str] | None = None, **columns: Any
) -> list[float]:
    """1 where the completion is `<think>...</think>`, once, and then an answer.

    What the chat template has opened, or opened and closed, at the end of the prompt counts as the completion's.
    """
    opened = [OPENED.search(end) for end in prompt_end or [""] * len(completions)]
    texts = [match[0] + text if match else text for match, text in zip(opened, completions, strict=True)]
    return [
        float(text.count("<think>") == text.count("</think>") == 1 and THINK.match(text) is not None) for text in texts
    ]


think.skip_special_tokens = False  # type: ignore[attr-defined]  # some tokenizers have the tags as special tokens


def overlong(
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    max_tokens: int = 0,
    buffer: int = 0,
    **columns: Any,
) -> list[float]:
    """DAPO's soft penalty for length l (arXiv 2503.14476): 0 up to `max_tokens - buffer`, then falling to -1.

        penalty = -clip((l - (max_tokens - buffer)) / buffer, 0, 1)

    A run fills in `sampler.max_new_tokens` and a fifth of it where the options are not given.
    """
    if not 0 < buffer <= max_tokens:
        raise UserError(
            f"reward.options.overlong: buffer ({buffer}) must be above 0 and at most max_tokens ({max_tokens})"
        )
    over = [(len(ids) - (max_tokens - buffer)) / buffer for ids in completion_ids]
    return [-min(max(share, 0.0), 1.0) for share in over]
