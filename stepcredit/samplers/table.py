"""Samplers by name."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.learn.placement import Placement
from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import source_of
from stepcredit.samplers.base import Sampler
from stepcredit.samplers.transformers import TransformersSampler


@dataclass(frozen=True)
class SamplerKind:
    columns: tuple[str, ...]
    elsewhere: bool


def sampler_kind(config: Config) -> SamplerKind:
    if config.sampler.name == "transformers":
        return SamplerKind(("rollout_logprobs", "entropy"), False)
    return SamplerKind(("rollout_logprobs",), True)


def build_sampler(config: Config, policy: Policy, placement: Placement) -> Sampler:
    """The sampler, with the weights of a policy that is still whole."""
    given = config.sampler
    if given.name == "transformers":
        return TransformersSampler(placement.sampling_copy(policy), given.max_rows, keep_mb=given.keep_mb)
    from stepcredit.samplers.remote.launch import LocalServer, lora_args
    from stepcredit.samplers.remote.vllm import VLLMSampler

    if bool(given.vllm.servers) == given.vllm.launch:
        raise UserError(
            "sampler.name vllm needs running servers (--sampler.vllm.servers http://HOST:PORT,...) or one of its own "
            "(--sampler.vllm.launch true), not both"
        )
    server: LocalServer | None = None
    urls, options = list(given.vllm.servers), given.vllm
    if options.launch:
        started: list[LocalServer] = []

        def start() -> str:
            processed = given.temperature not in (0.0, 1.0) and given.top_p == 1 and given.top_k == 0
            file = Path(tempfile.gettempdir()) / f"stepcredit-vllm-{os.getpid()}.log"
            model, dtype = source_of(config.model), dtype_of(policy)
            args = [*lora_args(config.lora.rank), *options.args]
            started.append(LocalServer(model, options.python, options.port, dtype, processed, args, file))
            return started[0].url

        urls = [placement.ranks.first(start)]
        server = started[0] if started else None
    folder = Path(options.folder) if options.folder else None
    return VLLMSampler(
        policy,
        urls,
        given.max_rows,
        options.timeout_s,
        options.patience_s,
        folder,
        placement.ranks,
        server,
        options.transfer,
        placement.device if placement.sharded else None,
    )


def dtype_of(policy: Policy) -> str:
    """The type that a policy computes in, as vLLM names it."""
    return str(policy.autocast or torch.float32).removeprefix("torch.")
