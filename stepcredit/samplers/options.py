"""How completions are drawn."""

from typing import Any

from pydantic import Field

from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.remote.options import ServerOptions
from stepcredit.section import Place


class SamplerOptions(SamplingParams):
    name: Place = "auto"  # auto, transformers, vllm (samplers/table.py), or the dotted path of a builder of your own
    max_new_tokens: int = Field(1024, ge=1)
    window: int = Field(0, ge=0)  # most new tokens of a completion in an iteration, then it waits for the next; 0: all
    max_rows: int = Field(256, ge=1)
    keep_mb: int = Field(4096, ge=0)  # keys and values that growing trees go on from
    server: ServerOptions = ServerOptions()  # of samplers that are servers
    options: dict[str, Any] = {}  # of a sampler of your own
