"""Samplers as users write them; tests name their builders by dotted path."""

from pathlib import Path

import torch

from stepcredit.forest.types import Segment
from stepcredit.samplers.base import sampler


class Plain:
    """Decodes one completion at a time, without a cache.

    Args:
        note: a file that gets a line for each call.
        shift: added to the log-probabilities that it gives, as if it had another model.
        logprobs: give them at all.
    """

    def __init__(self, policy, max_rows, note=None, shift=0.0, logprobs=True):
        self.policy, self.max_rows, self.metrics = policy, max_rows, {}
        self.note, self.shift, self.logprobs = note, shift, logprobs
        self.on_progress = lambda _: None

    @property
    def stop_token_ids(self):
        return tuple(self.policy.stop_token_ids)

    @torch.inference_mode()
    def sample(self, prompts, n, params, seeds, limits=None, num_reusable=None):
        if self.note:
            with Path(self.note).open("a") as file:
                file.write(f"{len(prompts)} x {n} at {params.temperature}\n")
        limits = [params.max_new_tokens] * len(prompts) if limits is None else limits
        return [
            [self._one(list(prompt), params.temperature, limit, seed * 1000 + number) for number in range(n)]
            for prompt, limit, seed in zip(prompts, limits, seeds, strict=True)
        ]

    def _one(self, ids, temperature, limit, seed):
        chance = torch.Generator().manual_seed(seed % 2**62)
        drawn, logprobs = [], []
        while len(drawn) < limit and (not drawn or drawn[-1] not in self.stop_token_ids):
            logits = self.policy.model(torch.tensor([ids + drawn])).logits[0, -1].float()
            table = torch.log_softmax(logits / (temperature or 1.0), -1)
            token = int(torch.multinomial(table.exp(), 1, generator=chance)) if temperature else int(table.argmax())
            drawn.append(token)
            logprobs.append(float(table[token]) + self.shift)
        self.on_progress(1)
        finish = "stop" if drawn[-1] in self.stop_token_ids else "length"
        return Segment(drawn, finish=finish, columns={"rollout_logprobs": logprobs} if self.logprobs else {})

    def sync(self, policy):
        assert policy is self.policy

    def close(self):
        pass


def undeclared(config, policy, placement, note=None, shift=0.0, logprobs=True):
    return Plain(policy, config.sampler.max_rows, note, shift, logprobs)


@sampler(columns=("rollout_logprobs",), elsewhere=False, copies_when_sharded=False)
def here(config, policy, placement):
    """In this program: its log-probabilities are the trainer's."""
    return Plain(policy, config.sampler.max_rows)


@sampler(columns=(), elsewhere=False, copies_when_sharded=False)
def without_logprobs(config, policy, placement):
    return Plain(policy, config.sampler.max_rows, logprobs=False)


@sampler(columns=(), elsewhere=True, copies_when_sharded=False)
def elsewhere_without_logprobs(config, policy, placement):
    return Plain(policy, config.sampler.max_rows, logprobs=False)
