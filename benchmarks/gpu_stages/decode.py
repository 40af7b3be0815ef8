"""Tokens a second of sampling, with and without CUDA graphs, beside what reading memory allows.

Completions have one length, so that rows neither end nor join. The floor of a step is reading the weights once, each
prompt's keys and values once for its group, and each row's own, at the measured rate of reading.
"""

import torch

from gpu_stages.bench import Bench, Numbers
from gpu_stages.shapes import SHAPES, make_policy, random_ids
from stepcredit.policy.forward import Policy
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler

try:
    from stepcredit.samplers.drawing import draw
except ImportError:  # where rows are not in pages
    from stepcredit.samplers.transformers import draw

ROWS, SMALL_ROWS = (64, 128, 256, 512, 1024), (4, 8)
GROUP = 4
PROMPT, LENGTH = 256, 256
SMALL_PROMPT, SMALL_LENGTH = 16, 12


def run(bench: Bench) -> None:
    bench.case("rates", bench.rates)
    for shape in bench.shapes:
        policies: list[Policy] = []

        def policy(shape: str = shape, policies: list[Policy] = policies) -> Policy:
            if not policies:
                policies.append(make_policy(shape, bench.device))
            return policies[0]

        for rows in SMALL_ROWS if bench.small else ROWS:
            for graphs in (True, False) if bench.device.type == "cuda" else (False,):
                name = f"{shape}, {rows} rows, {'with' if graphs else 'without'} graphs"
                bench.case(name, lambda p=policy, n=rows, g=graphs: sampled(bench, p(), n, g))
            bench.case(f"{shape}, {rows} rows, draw", lambda s=shape, n=rows: drawn(bench, s, n))
        most = SMALL_ROWS[-1] if bench.small else 256
        bench.case(f"{shape}, {most} rows, kernels", lambda p=policy, n=most: kernels(bench, p(), n))
        policies.clear()


def without_graphs(sampler: TransformersSampler) -> bool:
    """Let further calls launch every kernel of a step by itself; False where there is nothing to switch off."""
    steps = getattr(getattr(sampler, "machine", None), "steps", None)
    if steps is None or not steps.captures:
        return False
    steps.captures = False
    steps.graphs.clear()
    return True


def captured(sampler: TransformersSampler) -> bool:
    """Whether steps were captured."""
    return bool(getattr(getattr(getattr(sampler, "machine", None), "steps", None), "graphs", None))


def sampled(bench: Bench, policy: Policy, rows: int, graphs: bool) -> Numbers:
    prompt, length = (SMALL_PROMPT, SMALL_LENGTH) if bench.small else (PROMPT, LENGTH)
    read = bench.read_rate()

    def measured(number: int) -> Numbers:
        prompts = random_ids(shape_of(policy), number // GROUP, prompt)
        sampler = TransformersSampler(policy, number)
        params = SamplingParams(max_new_tokens=length, stop_token_ids=())

        def once() -> None:
            sampler.prefix_cache.clear()
            sampler.sample(prompts, GROUP, params, range(len(prompts)))

        if not graphs:
            once()  # makes what the graphs are captured from
            without_graphs(sampler)
        seconds = bench.seconds(once)
        if bench.device.type == "cuda" and captured(sampler) != graphs:
            raise RuntimeError(f"graphs were captured: {captured(sampler)}")
        peak = bench.peak_gib(once)
        sampler.close()
        floor = length * bytes_of_a_step(policy, number, prompt, length) / read
        return {
            "tokens_per_second": number * length / seconds,
            "ms_per_step": 1000 * seconds / length,
            "share_of_floor": floor / seconds,
            "added_gib": peak,
        }

    return bench.halving(measured, rows, "rows", GROUP)


def shape_of(policy: Policy) -> str:
    hidden, layers = policy.model.config.hidden_size, policy.model.config.num_hidden_layers
    return next(name for name, shape in SHAPES.items() if (shape[0], shape[2]) == (hidden, layers))


def bytes_of_a_step(policy: Policy, rows: int, prompt: int, length: int) -> float:
    """Weights in bf16, prompts once for their group, and half of the rows' own tokens, the mean over the steps."""
    config = policy.model.config
    size = config.hidden_size // config.num_attention_heads
    kept = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * size
    weights = 2 * sum(weight.numel() for weight in policy.parameters())
    return weights + kept * (rows // GROUP * prompt + rows * length / 2)


def drawn(bench: Bench, shape: str, rows: int) -> Numbers:
    """Drawing alone, plain and with top-p."""
    logits = torch.randn(rows, SHAPES[shape][-1], device=bench.device)
    uniform = torch.rand(rows, device=bench.device)
    found: Numbers = {}
    for name, params in (("plain", SamplingParams()), ("top-p", SamplingParams(top_p=0.9))):
        found[f"{name}_ms"] = 1000 * bench.seconds(lambda params=params: draw(logits, uniform, params))
    return found


def kernels(bench: Bench, policy: Policy, rows: int) -> Numbers:
    """What takes the time of sampling; `attention_share` is that of kernels named for attention."""
    prompts = random_ids(shape_of(policy), rows // GROUP, SMALL_PROMPT if bench.small else PROMPT)
    sampler = TransformersSampler(policy, rows)
    params = SamplingParams(max_new_tokens=SMALL_LENGTH if bench.small else 64, stop_token_ids=())
    found = bench.kernels(lambda: sampler.sample(prompts, GROUP, params, range(len(prompts))))
    named = ("flash", "flex", "attention", "attn", "sdpa")
    attention = sum(row["ms"] for row in found["kernels"] if any(text in row["name"].lower() for text in named))
    return found | {"attention_share": attention / found["kernel_ms"]}
