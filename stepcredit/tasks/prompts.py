"""From a problem to prompt token ids: the tokenizer's chat template where it has one, plain text otherwise."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from stepcredit.errors import UserError
from stepcredit.types import Problem


class PromptFormat:
    """Renders prompts.

    Args:
        tokenizer: its chat template is used when it has one.
        system_prompt: put before the question; needs a chat template.
        max_tokens: a longer prompt is an error.
        template_options: extra arguments of the chat template (`enable_thinking: false` ...).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str | None = None,
        max_tokens: int = 1024,
        template_options: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.system_prompt, self.max_tokens = tokenizer, system_prompt, max_tokens
        self.template_options = template_options or {}
        if system_prompt and not tokenizer.chat_template:
            raise UserError("task.system_prompt needs a chat template, and this tokenizer has none")

    def __call__(self, problem: Problem) -> list[int]:
        """Token ids of the prompt.

        Raises:
            UserError: the prompt is empty or longer than `max_tokens`, or chat messages meet no chat template.
        """
        if self.tokenizer.chat_template:
            messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
            question = problem.question
            messages += [{"role": "user", "content": question}] if isinstance(question, str) else question
            encoded: Any = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, **self.template_options
            )
            ids = list(encoded["input_ids"])
        elif isinstance(problem.question, str):
            ids = list(self.tokenizer(problem.question)["input_ids"])
        else:
            raise UserError(f"problem '{problem.id}' has chat messages, but the tokenizer has no chat template")
        if not ids:
            raise UserError(f"problem '{problem.id}': the prompt has no tokens")
        if len(ids) > self.max_tokens:
            raise UserError(
                f"problem '{problem.id}': the prompt has {len(ids)} tokens, over the limit of "
                f"{self.max_tokens}; raise it with --task.max-prompt-tokens or leave the row out"
            )
        return ids
