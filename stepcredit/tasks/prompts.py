"""From a problem to prompt token ids: the tokenizer's chat template where it has one, plain text otherwise."""

import string
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stepcredit.errors import UserError
from stepcredit.forest.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKEN_CHARS = 64  # a text of more characters a token than this is too long without being encoded


class PromptTooLong(UserError):
    """The prompt of a problem has more tokens than are allowed."""


class PromptFormat:
    """Renders prompts.

    Args:
        tokenizer: its chat template is used when it has one.
        system_prompt: put before the question; needs a chat template.
        max_tokens: a longer prompt is an error.
        chat_template_kwargs: extra arguments of the chat template (`enable_thinking: false` ...).
        template: text around a plain question, `{question}` and `{COLUMN}` filled in; lists are put line by line.
        check: called with the problem's name and the token ids of each prompt; raises where the model cannot take them.

    Attributes:
        longest: tokens of the longest prompt so far.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        system_prompt: str | None = None,
        max_tokens: int = 1024,
        chat_template_kwargs: dict[str, Any] | None = None,
        template: str | None = None,
        check: Callable[[str, list[int]], None] | None = None,
    ) -> None:
        self.tokenizer, self.system_prompt, self.max_tokens = tokenizer, system_prompt, max_tokens
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.template, self.check = template, check
        self.longest = 0
        if system_prompt and not tokenizer.chat_template:
            raise UserError("task.system_prompt needs a chat template, and this tokenizer has none")
        if template is not None and "question" not in _fields(template):
            raise UserError("task.prompt_template must have {question} in it; other braces are written {{ and }}")

    def __call__(self, problem: Problem) -> list[int]:
        """Token ids of the prompt.

        Raises:
            PromptTooLong: it has more than `max_tokens`.
            UserError: it is empty, `check` refuses it, chat messages meet no chat template, or the template names a
                column that is absent.
        """
        question = self._filled(problem)
        size = len(question) if isinstance(question, str) else sum(len(str(part["content"])) for part in question)
        if size > self.max_tokens * MAX_TOKEN_CHARS:
            raise self._too_long(problem, f"{size} characters")
        if self.tokenizer.chat_template:
            messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
            messages += [{"role": "user", "content": question}] if isinstance(question, str) else question
            encoded: Any = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, **self.chat_template_kwargs
            )
            ids = list(encoded["input_ids"])
        elif isinstance(question, str):
            ids = list(self.tokenizer(question)["input_ids"])
        else:
            raise UserError(f"problem '{problem.id}' has chat messages, but the tokenizer has no chat template")
        if not ids:
            raise UserError(f"problem '{problem.id}': the prompt has no tokens")
        if len(ids) > self.max_tokens:
            raise self._too_long(problem, f"{len(ids)} tokens")
        if self.check is not None:
            self.check(problem.id, ids)
        self.longest = max(self.longest, len(ids))
        return ids

    def _filled(self, problem: Problem) -> Any:
        if self.template is None:
            return problem.question
        if not isinstance(problem.question, str):
            raise UserError(f"problem '{problem.id}' has chat messages; task.prompt_template is for plain questions")
        values = {**problem.columns, "answer": problem.answer, "question": problem.question}
        shown = {name: "\n".join(map(str, v)) if isinstance(v, list) else v for name, v in values.items()}
        try:
            return self.template.format_map(shown)
        except (KeyError, AttributeError, IndexError, ValueError) as error:
            raise UserError(
                f"task.prompt_template: {error} is no column of problem '{problem.id}'; there are {', '.join(values)}"
            ) from error

    def _too_long(self, problem: Problem, size: str) -> PromptTooLong:
        return PromptTooLong(
            f"problem '{problem.id}': the prompt has {size}, over the limit of {self.max_tokens} tokens; raise it with "
            "--task.max-prompt-tokens or leave the row out"
        )


def _fields(template: str) -> set[str | None]:
    try:
        return {name for _, name, _, _ in string.Formatter().parse(template)}
    except ValueError as error:
        raise UserError(
            f"task.prompt_template: {error}; braces that stand for themselves are written {{{{ and }}}}"
        ) from error
