"""From a problem to prompt token ids: the tokenizer's chat template where it has one, plain text otherwise."""

import logging
import re
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from stepcredit.errors import UserError
from stepcredit.forest.types import Message, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("stepcredit")

OWNED = {  # arguments of apply_chat_template that make prompts what they must be
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}
READ_ANYWAY = {"chat_template", "documents", "sanitize_control_tokens", "tools"}  # not by the template alone
MAX_TOKEN_CHARS = 64  # a text of more characters a token than this is too long without being encoded


class PromptTooLong(UserError):
    """The prompt of a problem has more tokens than are allowed."""


class CompletionTooLong(PromptTooLong):
    """A completion of the data has more tokens than are allowed."""


class PromptFormat:
    """Renders prompts.

    Args:
        tokenizer: its chat template is used when it has one.
        system_prompt: put before questions that have no system message of their own; needs a chat template.
        max_tokens: a longer prompt is an error.
        chat_template_kwargs: extra arguments of the chat template (`enable_thinking: false` ...).
        template: text around a question, `{question}` and `{COLUMN}` filled in; lists are put line by line. Of chat
            messages the user's last one is the question.
        chat_template: "off" takes questions as prompts that are rendered already.
        check: called with the problem's name and the token ids of each prompt; raises where the model cannot take them.

    Attributes:
        longest: tokens of the longest prompt so far.

    Raises:
        UserError: options that this tokenizer or the template have no use for.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        system_prompt: str | None = None,
        max_tokens: int = 1024,
        chat_template_kwargs: dict[str, Any] | None = None,
        template: str | None = None,
        chat_template: Literal["auto", "off"] = "auto",
        check: Callable[[str, list[int]], None] | None = None,
    ) -> None:
        self.tokenizer, self.system_prompt, self.max_tokens = tokenizer, system_prompt, max_tokens
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.template, self.check = template, check
        self.longest = 0
        self.chat = bool(tokenizer.chat_template) and chat_template == "auto"
        self._why_no_chat = (
            "task.chat_template is off" if chat_template == "off" else "the tokenizer has no chat template"
        )
        self._said: set[str] = set()
        self._specials = special_tokens(tokenizer)
        self._start, self._end = added_tokens(tokenizer)
        if system_prompt and not self.chat:
            raise UserError(f"task.system_prompt needs a chat template, and {self._why_no_chat}")
        if template is not None and "question" not in _fields(template):
            raise UserError("task.prompt_template must have {question} in it; other braces are written {{ and }}")
        self._check_kwargs()

    def __call__(self, problem: Problem) -> list[int]:
        """Token ids of the prompt.

        Raises:
            PromptTooLong: it has more than `max_tokens`.
            UserError: it is empty, `check` refuses it, chat messages meet no chat template, the template fails, or the
                prompt template names a column that is absent.
        """
        question = self._filled(problem)
        texts = [question] if isinstance(question, str) else [each.get("content") or "" for each in question]
        size = sum(map(len, texts))
        if size > self.max_tokens * MAX_TOKEN_CHARS:
            raise self._too_long(problem, f"{size} characters")
        if self.chat:
            self._look_for_specials(problem, texts)
            ids = self._rendered(problem, question)
        elif isinstance(question, str):
            ids = self._plain(question)
        else:
            raise UserError(f"problem '{problem.id}' has chat messages, but {self._why_no_chat}")
        if not ids:
            raise UserError(f"problem '{problem.id}': the prompt has no tokens")
        if len(ids) > self.max_tokens:
            raise self._too_long(problem, f"{len(ids)} tokens")
        self._check_end(problem, ids)
        if self.check is not None:
            self.check(problem.id, ids)
        self.longest = max(self.longest, len(ids))
        return ids

    def completion(
        self, problem: Problem, prompt: Sequence[int], text: str | Message, stop: Sequence[int]
    ) -> list[int]:
        """Token ids of a completion that the data have, behind its prompt; the last one is of `stop`, if there are any.

        The two are encoded together; where that does not begin with the prompt's tokens, as it is when a model goes on
        from the prompt, the completion is encoded by itself.

        Args:
            text: or a message of the assistant.

        Raises:
            UserError: the chat template writes the prompt otherwise when an answer follows.
        """
        question = self._filled(problem)
        if self.chat:
            message = {"role": "assistant", "content": text} if isinstance(text, str) else text
            whole = self._encoded(problem, [*self._messages(problem, question), message])
            if whole[: len(prompt)] != list(prompt):
                raise UserError(
                    f"problem '{problem.id}': with an answer behind it the chat template writes the prompt otherwise "
                    "than without, so the completion has no beginning; try --task.chat-template-kwargs.enable_thinking "
                    "false, or --task.chat-template off with prompts and completions that are rendered already"
                )
            return self._ended(whole[len(prompt) :], stop)
        text = text if isinstance(text, str) else text["content"]
        whole = self._plain(question + text)
        if whole[: len(prompt)] == list(prompt):
            return self._ended(whole[len(prompt) :], stop)
        self._say(
            "apart", "prompts and completions are encoded each by itself: their tokens would merge ('%s')", problem.id
        )
        return self._ended(list(self.tokenizer(text, add_special_tokens=False)["input_ids"]), stop)

    def _ended(self, ids: list[int], stop: Sequence[int]) -> list[int]:
        """Up to its last end token, if only space stands behind that; otherwise with one behind it."""
        last = max((place for place, token in enumerate(ids) if token in stop), default=None)
        if last is not None and not str(self.tokenizer.decode(ids[last + 1 :])).strip():
            return ids[: last + 1]
        usual = self.tokenizer.eos_token_id
        return ids + ([usual] if usual in stop else list(stop[:1]))

    def _check_kwargs(self) -> None:
        for name in self.chat_template_kwargs:
            option = f"task.chat_template_kwargs.{name}"
            if not self.chat:
                raise UserError(f"{option} needs a chat template, and {self._why_no_chat}")
            if name in OWNED:
                raise UserError(f"{option}: prompts are rendered with a value of their own for it; leave it out")
            template = self.tokenizer.chat_template
            if name not in READ_ANYWAY and name not in str(template):
                log.warning("%s: the chat template of this tokenizer does not read it", option)

    def _rendered(self, problem: Problem, question: Any) -> list[int]:
        return self._encoded(problem, self._messages(problem, question), add_generation_prompt=True)

    def _messages(self, problem: Problem, question: Any) -> list[Message]:
        messages: list[Message] = [{"role": "user", "content": question}] if isinstance(question, str) else question
        if self.system_prompt:
            if any(message["role"] in ("system", "developer") for message in messages):
                text = "problem '%s' has a system message, which stays; task.system_prompt is for problems without one"
                self._say("system", text, problem.id)
            else:
                messages = [{"role": "system", "content": self.system_prompt}, *messages]
        return messages

    def _encoded(self, problem: Problem, messages: list[Message], add_generation_prompt: bool = False) -> list[int]:
        try:
            encoded: Any = self.tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=add_generation_prompt,
                return_dict=True,
                **self.chat_template_kwargs,
            )
        except Exception as error:  # a template is a program, and fails as programs do
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
            roles = ", ".join(message["role"] for message in messages)
            given = [name for name in ("system_prompt", "chat_template_kwargs") if getattr(self, name)]
            hint = f"; try it without {' and '.join(f'task.{name}' for name in given)}" if given else ""
            raise UserError(
                f"problem '{problem.id}': the tokenizer's chat template fails on its messages ({roles}): {reason}{hint}"
            ) from error
        return list(encoded["input_ids"])

    def _plain(self, text: str) -> list[int]:
        """Tokens of a text, without what the tokenizer would put behind it, and with one start token."""
        ids = list(self.tokenizer(text)["input_ids"])
        if self._end and ids[-len(self._end) :] == self._end:
            ids = ids[: -len(self._end)]
            added = self.tokenizer.convert_ids_to_tokens(self._end)
            self._say("end", "the tokenizer puts %s behind every text; prompts go without", " ".join(added))
        size = len(self._start)
        return ids[size:] if size and ids[size : 2 * size] == self._start else ids

    def _look_for_specials(self, problem: Problem, texts: Sequence[str]) -> None:
        if "specials" not in self._said and (found := next(filter(None, map(self._special_in, texts)), None)):
            text = (
                "problem '%s' has the special token %s in its text, inside the chat template's own; where prompts are "
                "rendered already, set --task.chat-template off"
            )
            self._say("specials", text, problem.id, found)

    def _special_in(self, text: str) -> str | None:
        match = self._specials.search(text) if self._specials else None
        return match[0] if match else None

    def _check_end(self, problem: Problem, ids: Sequence[int]) -> None:
        """Say so where a prompt ends as a completion does: nothing asks the model to answer."""
        end = next((token for token in reversed(ids[-3:]) if str(self.tokenizer.decode([token])).strip()), None)
        if end is not None and end == self.tokenizer.eos_token_id:
            why = "the chat template adds no assistant turn" if self.chat else "its text ends so"
            text = "the prompt of problem '%s' ends with the end token %s: %s, so the model has nothing to go on from"
            self._say("ends", text, problem.id, self.tokenizer.eos_token, why)

    def _say(self, kind: str, text: str, *values: Any) -> None:
        if kind not in self._said:
            self._said.add(kind)
            log.warning(text, *values)

    def _filled(self, problem: Problem) -> Any:
        if self.template is None:
            return problem.question
        if isinstance(problem.question, str):
            return self._around(problem, problem.question)
        users = [number for number, message in enumerate(problem.question) if message["role"] == "user"]
        if not users:
            raise UserError(f"problem '{problem.id}' has no user message for task.prompt_template")
        last = problem.question[users[-1]]
        filled = last | {"content": self._around(problem, last["content"])}
        return [filled if number == users[-1] else message for number, message in enumerate(problem.question)]

    def _around(self, problem: Problem, question: str) -> str:
        assert self.template is not None
        values = {**problem.columns, "answer": problem.answer, "question": question}
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


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """Finds special tokens that stand in a text as they are written; None where there are none."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {*map(str, tokenizer.all_special_tokens), *(token.content for token in added if token.special)}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def added_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text by itself."""
    probe = "1"
    bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(probe)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
