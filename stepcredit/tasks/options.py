"""What to train on, and how it becomes prompts."""

from typing import Any, Literal

from pydantic import Field

from stepcredit.section import Place, Section


class TaskOptions(Section):
    data: Place = "embedded"  # embedded | file (.jsonl .json .csv .parquet) | hub id
    split: str = "train"
    eval_data: Place | None = None  # held-out problems; None holds out a share of `data`
    eval_split: str = "test"
    held_out: float = Field(0.1, ge=0, lt=1)
    columns: dict[str, str] = {}  # question, answer, id -> name of the column
    system_prompt: str | None = None
    prompt_template: str | None = None  # text around a question, {question} and {COLUMN} filled in
    max_prompt_tokens: int = Field(1024, ge=1)
    chat_template_kwargs: dict[str, Any] = {}  # of the tokenizer's chat template, such as enable_thinking
    long_prompts: Literal["drop", "raise"] = "drop"  # rows over max_prompt_tokens are left out and counted, or an error
