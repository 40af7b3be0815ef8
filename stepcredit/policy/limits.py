"""What token ids and positions a model has weights for, checked before anything is sampled.

Beyond learned or tabulated positions (GPT-2, OPT, GPT-J ...) there are no weights, so a longer row is an error. Rotary
embeddings are computed for any position, and what a model was trained for is a matter of quality, so a longer row is a
warning; those that change with the longest row of a call are an error, because a token would have no log-probability of
its own (`Policy.check_length`). Linear biases (ALiBi) have no limit.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from stepcredit.errors import UserError

if TYPE_CHECKING:
    from stepcredit.policy.forward import Policy

log = logging.getLogger("stepcredit")

LEARNED = ("wpe", "embed_positions", "position_embedding", "position_embeddings", "embed_position")  # names of modules
TABULATED = ("gptj", "codegen")  # rotary embeddings read from a table
OF_LENGTH = "lower --sampler.max-new-tokens or --task.max-prompt-tokens"


@dataclass(frozen=True)
class Positions:
    """
    Attributes:
        count: how many there are; None: no limit is known.
        fixed: beyond them there are no weights.
    """

    count: int | None = None
    fixed: bool = False


def positions_of(model: PreTrainedModel) -> Positions:
    """How many positions a model has."""
    config = model.config.get_text_config()
    count = getattr(config, "max_position_embeddings", None)
    if not isinstance(count, int) or count <= 0 or getattr(config, "alibi", False):
        return Positions()
    learned = any(
        isinstance(module, nn.Embedding) and name.split(".")[-1] in LEARNED for name, module in model.named_modules()
    )
    if learned or config.model_type in TABULATED:
        return Positions(count, fixed=True)
    return Positions(max([count, *(_stretched(kind, count) for kind in rope_kinds(config))]))


def rope_kinds(config: Any) -> list[dict[str, Any]]:
    """The parameters of a config's rotary embeddings: one, or one for each kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    return [given] if "rope_type" in given else [kind for kind in given.values() if isinstance(kind, dict)]


def _stretched(kind: dict[str, Any], count: int) -> int:
    """Positions of a rotary embedding that scaling stretches; configs give their number before or after it."""
    original = kind.get("original_max_position_embeddings")
    return int((kind.get("factor") or 1.0) * original) if original else count


def steady_length(config: Any) -> int | None:
    """Up to where a rotary embedding is one and the same; None: everywhere."""
    changing = [kind for kind in rope_kinds(config) if kind.get("rope_type") in ("dynamic", "longrope")]
    if not changing:
        return None
    original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return min(int(kind.get("original_max_position_embeddings") or original) for kind in changing)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Token ids that a model can read and give: rows of its embedding."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def check_vocabulary(policy: "Policy", where: str) -> None:
    """Compare embedding, output layer and tokenizer; more rows than tokens are padding.

    Args:
        where: begins the message, such as "model: 'my-folder'".

    Raises:
        UserError: the embedding and the output layer have different numbers of tokens.
    """
    read, given = vocabulary_of(policy.model), int(policy.model.get_output_embeddings().weight.shape[0])
    if read != given:
        raise UserError(
            f"{where} reads {read} tokens and gives {given}: embedding and output layer differ; resize both "
            "(resize_token_embeddings), or take the model as it was published"
        )
    beyond = sum(number >= read for number in policy.tokenizer.get_vocab().values())
    if beyond:
        log.warning(
            "%s has a tokenizer with %d tokens beyond the model's %d; a prompt that has one is refused. Is the "
            "tokenizer of another model?",
            where,
            beyond,
            read,
        )


def check_shared_vocabulary(scorer: "Policy", policy: "Policy", where: str) -> None:
    """Look whether a model with the policy's tokenizer can score all that the policy may sample.

    Rows of padding differ between sizes of one family; a trained model hardly ever samples one, so these are a warning.

    Args:
        where: begins the message, such as "prm.model: 'my-folder'".

    Raises:
        UserError: the model lacks rows for tokens that have a text.
    """
    if scorer.vocabulary >= policy.vocabulary:
        return
    named = [number for number in policy.tokenizer.get_vocab().values() if number < policy.vocabulary]
    lacking = sum(number >= scorer.vocabulary for number in named)
    if lacking:
        raise UserError(
            f"{where} has {scorer.vocabulary} tokens and lacks {lacking} of those that the policy samples; give one "
            "with the policy's vocabulary"
        )
    log.warning(
        "%s has %d rows for tokens and the policy %d; a run whose policy samples one of the others, which have no "
        "text, ends with an error",
        where,
        scorer.vocabulary,
        policy.vocabulary,
    )


def check_stop_tokens(stop: Sequence[int], vocabulary: int) -> None:
    """Look whether completions can end.

    Args:
        stop: ids that end a completion.

    Raises:
        UserError: one is not in the vocabulary.
    """
    outside = [number for number in stop if not 0 <= number < vocabulary]
    if outside:
        raise UserError(
            f"sampler.stop_token_ids: the model has tokens 0 to {vocabulary - 1}, so {_listed(outside)} cannot end a "
            "completion; give others (without the option those of the model's generation_config.json, else of its "
            "tokenizer, are taken)"
        )
    if not stop:
        log.warning(
            "neither the model nor its tokenizer names a token that ends a completion, so all run to "
            "--sampler.max-new-tokens; name some with --sampler.stop-token-ids"
        )


def check_token_ids(token_ids: Sequence[int], vocabulary: int, whose: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Args:
        whose: begins the message, such as "problem 'p3': the prompt".

    Raises:
        UserError: naming the first one.
    """
    for number in token_ids:
        if not 0 <= number < vocabulary:
            raise UserError(
                f"{whose} has token id {number}, and the model has 0 to {vocabulary - 1}; give the model its own "
                "tokenizer, or enlarge its embedding (resize_token_embeddings)"
            )


def check_positions(positions: Positions, longest: int, whose: str, remedy: str = OF_LENGTH) -> bool:
    """Whether a row of so many tokens stays within a model's positions; the log says so where it does not.

    Args:
        whose: begins the message, such as "model: a prompt of 90 tokens and ...".

    Raises:
        UserError: beyond them there are no weights.
    """
    if positions.count is None or longest <= positions.count:
        return True
    if positions.fixed:
        raise UserError(f"{whose} make {longest} positions, and the model has {positions.count}; {remedy}")
    log.warning(
        "%s make %d positions, and the model was trained for %d (max_position_embeddings); beyond them it may write "
        "nonsense. %s",
        whose,
        longest,
        positions.count,
        remedy[:1].upper() + remedy[1:],
    )
    return False


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


class PromptCheck:
    """Looks at prompts before they are sampled from.

    Args:
        policy: that is sampled from.
        max_new_tokens: of a path, of trees too.

    Raises:
        UserError: not even a prompt of one token leaves room for them.
    """

    def __init__(self, policy: "Policy", max_new_tokens: int) -> None:
        self.policy, self.max_new_tokens = policy, max_new_tokens
        self.warned = False
        self._check_length("sampler: a prompt", 1)

    def __call__(self, name: str, token_ids: Sequence[int]) -> None:
        """Refuse what the model cannot compute; say once what it was not trained for.

        Raises:
            UserError: a token id or the length is beyond the model.
        """
        whose = f"problem '{name}': the prompt"
        check_token_ids(token_ids, self.policy.vocabulary, whose)
        self._check_length(whose, len(token_ids))

    def _check_length(self, whose: str, prompt: int) -> None:
        longest = prompt + self.max_new_tokens
        if not self.warned:
            whose += f" of {prompt} token{'s' if prompt > 1 else ''} and sampler.max_new_tokens {self.max_new_tokens}"
            self.warned = not check_positions(self.policy.positions, longest, whose)
        self.policy.check_length(longest)
