"""What to train on, and how it becomes prompts."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from stepcredit.section import Numbers, Place, Section


def _joined(value: Any) -> Any:
    """A list of files as one text."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _off(value: Any) -> Any:
    """YAML reads `off` as false."""
    return "off" if value is False else value


class TaskOptions(Section):
    data: Annotated[Place, BeforeValidator(_joined)] = (
        "embedded"  # embedded | file | hub id | gym:TASK; lists, * (docs/data.md)
    )
    weights: Numbers = []  # of several sources; empty: all alike, and of files alone every row as often
    gym: dict[str, dict[str, Any]] = {}  # of reasoning-gym: task -> its options, level, allow (docs/gym.md)
    gym_answer: Literal["tags", "line", "plain"] = "tags"  # where the answer is asked for and read
    split: str = "train"
    eval_data: Place | None = None  # held-out problems; None holds out a share of `data`
    eval_split: str = "test"
    held_out: float = Field(0.1, ge=0, lt=1)
    columns: dict[str, str] = {}  # question, answer, id, source -> name of the column
    system_prompt: str | None = None
    prompt_template: str | None = (
        None  # text around a question (of a chat the last one), {question}, {COLUMN} filled in
    )
    chat_template: Annotated[Literal["auto", "off"], BeforeValidator(_off)] = (
        "auto"  # off: prompts are rendered already
    )
    max_prompt_tokens: int = Field(1024, ge=1)
    chat_template_kwargs: dict[str, Any] = {}  # of the tokenizer's chat template, such as enable_thinking
    long_prompts: Literal["drop", "raise"] = "drop"  # rows over max_prompt_tokens are left out and counted, or an error
