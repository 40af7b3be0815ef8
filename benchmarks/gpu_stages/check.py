"""Whether everything computes what it should on this device: kernels against fp64, and whole runs.

schemas      the operators and functions of torch that are called have the arguments that are passed
attention    packed rows of 1 to 4,096 positions against fp64, forward and backward, by head size and grouping
head         log-probabilities, entropies and gradients of the output layer against fp64
greedy       greedy completions of the embedded model equal those of transformers' `generate`
train, resumed, torchrun ...    whole runs of the embedded task, by command
"""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gpu_stages.bench import Bench, Numbers
from gpu_stages.decode import captured
from gpu_stages.shapes import tree_of
from stepcredit.demo.chain import problems
from stepcredit.policy import attention as attention_module
from stepcredit.policy.attention import AttentionRule, ForestPlan
from stepcredit.policy.head import score_states
from stepcredit.policy.loading import load_policy
from stepcredit.policy.packing import Packing
from stepcredit.run.checkpoint import newest_checkpoint
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler

OPERATORS = {  # of aten, with the arguments that this project passes
    "_scaled_dot_product_flash_attention.default": "query key value dropout_p is_causal scale",
    "_scaled_dot_product_flash_attention_backward.default": "grad_out query key value out logsumexp cum_seq_q "
    "cum_seq_k max_q max_k dropout_p is_causal philox_seed philox_offset scale",
    "mm.dtype": "self mat2 out_dtype",
    "addmm.dtype_out": "self mat1 mat2 out_dtype out",
    "_fused_adamw_.default": "self grads exp_avgs exp_avg_sqs state_steps lr",
}
FUNCTIONS = {
    flex_attention: "query key value score_mod block_mask scale enable_gqa kernel_options",
    BlockMask: "seq_lengths kv_num_blocks kv_indices full_kv_num_blocks full_kv_indices q_num_blocks q_indices "
    "full_q_num_blocks full_q_indices BLOCK_SIZE mask_mod",
    BlockMask.from_kv_blocks: "kv_num_blocks kv_indices BLOCK_SIZE mask_mod seq_lengths compute_q_blocks",
}
HEADS = [(64, 1), (64, 2), (64, 6), (64, 7), (80, 2), (96, 2), (128, 1), (128, 2), (128, 6), (128, 7), (256, 2)]
SMALL_HEADS = [(16, 1), (64, 7)]
LENGTHS, SMALL_LENGTHS = (1, 2, 127, 128, 129, 1000, 4096), (1, 129)
SMALL_RUN = f"""--train.problems-per-iteration 3 --group-size 3 --eval.num-problems 0 --sampler.max-new-tokens 10
    --sampler.temperature 3 --reward.functions {Path(__file__).parents[1] / "even.py"}:share_even --reward.workers 0
    --reward.gold-check 0"""
BOUND = {torch.bfloat16: 2e-2, torch.float32: 2e-3}  # of the distance to fp64, over its size


def run(bench: Bench) -> None:
    bench.case("schemas", schemas)
    for size, group in SMALL_HEADS if bench.small else HEADS:
        bench.case(
            f"attention, head size {size}, {group} queries a key", lambda s=size, g=group: attention(bench, s, g)
        )
    for dtype in (torch.bfloat16, torch.float32):
        bench.case(f"head, {str(dtype).removeprefix('torch.')}", lambda dtype=dtype: head(bench, dtype))
    bench.case("greedy", lambda: greedy(bench))
    with tempfile.TemporaryDirectory() as place:
        runs(bench, Path(place))


def schemas() -> None:
    for name, arguments in OPERATORS.items():
        packet, overload = name.split(".")
        schema = getattr(getattr(torch.ops.aten, packet), overload)._schema
        has = {argument.name for argument in schema.arguments}
        if missing := set(arguments.split()) - has:
            raise TypeError(f"aten::{name} has no {sorted(missing)}: {schema}")
    for function, arguments in FUNCTIONS.items():
        if missing := set(arguments.split()) - set(inspect.signature(function).parameters):
            raise TypeError(f"{function} has no {sorted(missing)}")


# ------------------------------------------------------------------ kernels


def distance(result: Tensor, exact: Tensor) -> float:
    """Of a result in any type to one in fp64, over the size of the latter."""
    return float((result.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def require(found: dict[str, float], bound: float) -> None:
    wrong = {name: value for name, value in found.items() if not value <= bound}  # not a number is wrong
    if wrong:
        raise ArithmeticError(f"further than {bound:g} from fp64: {wrong}")


def visible_in(packing: Packing) -> Tensor:
    """[positions, positions] which keys a query sees."""
    size = max(end for _, end in packing.squares)
    visible = torch.zeros(size, size, dtype=torch.bool)
    for first, end in packing.squares:
        visible[first:end, first:end] = torch.ones(end - first, end - first).tril().bool()
    for level in packing.rectangles:
        for first, end, last in level:
            visible[end:last, first:end] = True
    return visible


def attention(bench: Bench, size: int, group: int) -> Numbers:
    found: Numbers = {}
    for length in SMALL_LENGTHS if bench.small else LENGTHS:
        packing, _ = Packing.of_forest(tree_of(length), bench.device)
        errors = attention_errors(packing, size, group, bench.device)
        require(errors, BOUND[torch.bfloat16])
        found[f"at {length}"] = max(errors.values())
    return found


def attention_errors(packing: Packing, size: int, group: int, device: torch.device) -> dict[str, float]:
    visible = visible_in(packing).to(device)
    real, row, kv_heads = len(visible), len(packing.token_ids), 2
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, kv_heads * group, row, size), *2 * [(1, kv_heads, row, size)], (1, row, kv_heads * group, size)]
    *given, grad = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes)
    grad[:, real:] = 0
    rule = AttentionRule(size**-0.5)
    rough = [tensor.clone().requires_grad_() for tensor in given]
    plan = ForestPlan(packing)
    out = plan.attend(0, *rough, rule)
    require_one_call(plan, rough[0])
    grads = torch.autograd.grad(out, rough, grad)

    exact = [tensor[:, :, :real].double().requires_grad_() for tensor in given]
    query = exact[0].unflatten(1, (kv_heads, group))
    scores = (query @ exact[1][:, :, None].mT * rule.scale).masked_fill(~visible, -torch.inf)
    wanted = (scores.softmax(-1) @ exact[2][:, :, None]).flatten(1, 2).transpose(1, 2)
    expected = torch.autograd.grad(wanted, exact, grad[:, :real].double())
    found = {"output": distance(out[:, :real], wanted)}
    names = ("gradient of queries", "gradient of keys", "gradient of values")
    if real > 1:  # of one score there is no gradient but that of the value
        found |= {name: distance(one[:, :, :real], two) for name, one, two in zip(names, grads, expected, strict=True)}
    return found


def require_one_call(plan: ForestPlan, query: Tensor) -> None:
    """That a GPU computed the row in one masked call: where that fails a slower way is taken, with a warning."""
    in_one_call = getattr(attention_module, "in_one_call", None)
    if in_one_call is None or query.device.type != "cuda":
        return
    if not all(in_one_call(query.device, query.dtype, heads) for heads in plan.heads):
        raise RuntimeError("the row was not computed in one masked call; the log says why")


def head(bench: Bench, dtype: torch.dtype) -> Numbers:
    n, hidden, vocabulary = (16, 32, 512) if bench.small else (256, 896, 151936)
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(rows, hidden, generator=generator).to(bench.device) for rows in (n, vocabulary))
    weight *= 2 * hidden**-0.5
    states, weight = states.to(dtype).float(), weight.to(dtype).float()  # the operands are exact, the products are not
    targets = torch.randint(0, vocabulary, (n,), generator=generator).to(bench.device)
    upstream = torch.randn(2, n, generator=generator).to(bench.device)
    layer = torch.nn.Linear(hidden, vocabulary, bias=False, device=bench.device)
    layer.weight.data.copy_(weight)
    rough = states.clone().requires_grad_()
    half = torch.autocast(bench.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    with half:
        scores = score_states(rough, targets, layer, 0.7, entropy_grad=True)
    (scores.logprobs * upstream[0] + scores.entropy * upstream[1]).sum().backward()

    exact, matrix = states.double().requires_grad_(), weight.double().requires_grad_()
    logprobs = torch.log_softmax(exact @ matrix.T / 0.7, -1)
    chosen, entropy = logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)
    (chosen * upstream[0].double() + entropy * upstream[1].double()).sum().backward()
    assert rough.grad is not None and layer.weight.grad is not None and exact.grad is not None
    assert matrix.grad is not None
    found = {
        "log-probabilities": distance(scores.logprobs, chosen),
        "entropies": distance(scores.entropy, entropy),
        "gradient of states": distance(rough.grad, exact.grad),
        "gradient of the weight": distance(layer.weight.grad, matrix.grad),
    }
    require(found, BOUND[dtype])
    return found


# ------------------------------------------------------------------ sampling


def greedy(bench: Bench) -> Numbers:
    """In fp32; where they part, both tokens must be equally likely to rounding."""
    policy = load_policy("embedded", str(bench.device), "float32")
    length, count = (8, 2) if bench.small else (48, 16)
    questions = [str(problem.question) for problem in problems("held_out", 0, count)]
    prompts = [list(policy.tokenizer(text)["input_ids"]) for text in questions]
    sampler = TransformersSampler(policy)
    params = SamplingParams(max_new_tokens=length, temperature=0.0)
    groups = sampler.sample(prompts, 1, params, range(count))
    if bench.device.type == "cuda" and not captured(sampler):
        raise RuntimeError("decode steps were not captured as CUDA graphs; the log says why")
    policy.scoring_form = "plain"
    equal = 0
    for prompt, (segment,) in zip(prompts, groups, strict=True):
        ids = torch.tensor([prompt], device=bench.device)
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            row = policy.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=length, temperature=None
            )[0].tolist()
            ours, theirs = list(segment.token_ids), row[len(prompt) :]
            if ours == theirs:
                equal += 1
                continue
            shared = next(number for number, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
            before = torch.tensor([prompt + ours[:shared]], device=bench.device)
            logits = policy.model(before).logits[0, -1]
        gap = float((logits[ours[shared]] - logits[theirs[shared]]).abs())
        if gap > 1e-3:
            raise ArithmeticError(f"greedy tokens differ where their logits differ by {gap:.2g}")
    return {"equal": equal, "of": count}


# ------------------------------------------------------------------ whole runs


def runs(bench: Bench, place: Path) -> None:
    iterations = 2 if bench.small else 30
    alone = place / "train"
    bench.case("train", lambda: train(bench, alone, iterations))
    bench.case("train, resumed", lambda: train(bench, alone, iterations + 1, "--resume", "auto"))
    few = min(iterations, 5)
    adapters = ("--lora.rank", "8", "--learning-rate", "1e-2")
    bench.case("train, adapters", lambda: train(bench, place / "adapters", few, *adapters))
    sharded = ("--distributed.strategy", "fsdp")
    for name, words in {
        "ddp": ("--distributed.strategy", "ddp"),
        "fsdp": sharded,
        "fsdp with offload": (*sharded, "--distributed.cpu-offload", "true"),
        "fsdp with adapters": (*sharded, *adapters),
    }.items():
        run_dir = place / name.replace(" ", "-")
        bench.case(f"torchrun, {name}", lambda d=run_dir, w=words: train(bench, d, few, *w, torchrun=True))


def train(bench: Bench, run: Path, iterations: int, *words: str, torchrun: bool = False) -> Numbers:
    """A run of the embedded task, which must change the weights by finite gradients.

    A gradient that is 0 at every iteration, or weights that stay as they were, are a failure.
    """
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"] if torchrun else []
    command = [sys.executable, "-m", *launcher, "stepcredit", "train", "--device", str(bench.device), "--seed", "1"]
    command += ["--iterations", str(iterations), "--run-dir", str(run), "--optim.schedule", "constant"]
    command += [
        "--checkpoint.every",
        "1",
        "--checkpoint.keep",
        "99",
        *(SMALL_RUN.split() if bench.small else []),
        *words,
    ]
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=here)
    if done.returncode not in (0, 1):  # 1: it ran, and an alarm is on
        raise RuntimeError(f"exit code {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    norms = [row["optim/grad_norm"] for row in rows if "optim/grad_norm" in row]
    if rows[-1]["iteration"] != iterations or not any(norm > 0 for norm in norms):
        raise RuntimeError(f"iteration {rows[-1]['iteration']} of {iterations}; norms of gradients: {norms}")
    newest = newest_checkpoint(run)
    assert newest is not None
    first = min(newest.parent.glob("[0-9]*"))
    before, after = (load_file(next(folder.glob("*model.safetensors"))) for folder in (first, newest))
    moved = any(not before[name].equal(after[name]) for name in before)
    if not moved and iterations > 1:
        raise RuntimeError("the weights are those of the first checkpoint")
    per_second = [row["tokens/per_second"] for row in rows if "tokens/per_second" in row]
    return {
        "iterations": iterations,
        "tokens_per_second": max(per_second),
        "reward": rows[-1]["reward/mean"],
        "nonfinite": sum(row.get("optim/nonfinite", 0) for row in rows),
    }
