"""The engine on one GPU, shapes of real models with random weights, in bf16; each number beside its floor, in one run.

update      forward and backward of groups and trees: forest engine against one row per completion or node, positions a
            second, share of the measured matrix rate, peak memory; and how far the two differ
sampling    tokens a second of the decode loop, and the floor of reading the weights once a step

python benchmarks/gpu.py [--shapes 0.5b 1.5b] [--budget 16384] [--repeats 3] [--json FILE]
python benchmarks/gpu.py --device cpu --shapes tiny        to try it without a GPU
python benchmarks/learning.py "--algorithm grpo" "--algorithm treerpo"        a real run, on the GPU where there is one
"""

import argparse
import json
import platform
import time
from collections.abc import Callable

import torch
from forest import Case, make_forest, one_row_per_node, operations
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from stepcredit.forest import Forest
from stepcredit.policy.forward import Path, Policy, score
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler

SHAPES = {  # hidden, intermediate, layers, heads, heads of keys and values, vocabulary
    "tiny": (64, 192, 2, 4, 2, 512),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
}
CASES = {
    "group 8 x 512 behind 256": Case(prompt=256, branches=8, depth=1, tokens=512, trees=4),
    "group 8 x 512 behind 2048": Case(prompt=2048, branches=8, depth=1, tokens=512, trees=2),
    "tree 4^3 x 128": Case(prompt=256, branches=4, depth=3, tokens=128, trees=2),
    "tree 8^3 x 64": Case(prompt=256, branches=8, depth=3, tokens=64, trees=1),
}
SMALL = {
    "group 8 x 64 behind 32": Case(prompt=32, branches=8, depth=1, tokens=64, trees=2),
    "tree 4^3 x 8": Case(prompt=32, branches=4, depth=3, tokens=8, trees=2),
}


def make_policy(shape: str, device: torch.device) -> Policy:
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with device:
        network = Qwen2ForCausalLM(config)
    return Policy(network, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel())), torch.bfloat16)


class Device:
    """Time and memory of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def best(self, run: Callable[[], object], repeats: int) -> float:
        """Least seconds, after one call that warms up."""
        least = float("inf")
        for number in range(repeats + 1):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            least = min(least, time.perf_counter() - started) if number else least
        return least

    def peak_gib(self, run: Callable[[], object]) -> float:
        """What a call adds at most; 0 where that cannot be asked."""
        if not self.cuda:
            run()
            return 0.0
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def matrix_rate(self) -> float:
        """Operations a second of a large product in bf16."""
        size = 8192 if self.cuda else 1024
        left, right = torch.randn(2, size, size, device=self.device, dtype=torch.bfloat16)
        return 2 * size**3 / self.best(lambda: left @ right, 5)

    def read_rate(self) -> float:
        """Bytes a second of reading memory."""
        values = torch.ones(2**30 if self.cuda else 2**24, device=self.device, dtype=torch.uint8)
        return len(values) / self.best(lambda: values.view(torch.int64).sum(), 5)


def update(policy: Policy, forest: Forest, path: Path, budget: int) -> None:
    policy.scoring_form = path
    for part in policy.parts(forest, budget):
        policy(part).logprobs.sum().backward()
    policy.zero_grad()


def measure_update(policy: Policy, device: Device, case: Case, budget: int, repeats: int, rate: float) -> dict:
    forest = make_forest(case)
    rows = one_row_per_node(forest)
    positions = policy.num_positions(forest)
    found = {"positions": positions, "arithmetic": operations(policy, rows) / operations(policy, forest)}
    for name, path, table in (("forest", "forest", forest), ("rows", "plain", rows)):
        found[name] = device.best(lambda path=path, table=table: update(policy, table, path, budget), repeats)
        found[f"{name}_gib"] = device.peak_gib(lambda path=path, table=table: update(policy, table, path, budget))
    found["ratio"] = found["rows"] / found["forest"]
    found["positions_per_second"] = positions / found["forest"]
    found["share_of_rate"] = operations(policy, forest) / found["forest"] / rate
    return found


def measure_exactness(policy: Policy, case: Case, budget: int) -> dict[str, float]:
    """Largest difference of log-probabilities between the packed form and one row per completion."""
    forest, found = make_forest(case), {}
    for name, autocast in (("bf16", torch.bfloat16), ("fp32", None)):
        policy.autocast, scores = autocast, {}
        for path in ("forest", "plain"):
            policy.scoring_form = path
            scores[path] = score(policy, forest, 1.0, budget).logprobs
        found[name] = float((scores["forest"] - scores["plain"]).abs().max())
    policy.autocast = torch.bfloat16
    return found


def measure_sampling(policy: Policy, device: Device, small: bool, repeats: int) -> dict[str, float]:
    """Completions of one length, so that only the loop is measured."""
    prompts, group, length = (4, 4, 16) if small else (32, 8, 256)
    ids = torch.randint(0, policy.model.config.vocab_size, (prompts, 64 if small else 256)).tolist()
    policy.scoring_form = "forest"
    sampler = TransformersSampler(policy, prompts * group)
    params = SamplingParams(max_new_tokens=length, stop_token_ids=())
    seconds = device.best(lambda: sampler.sample(ids, group, params, range(prompts)), repeats)
    weights = 2 * sum(weight.numel() for weight in policy.parameters())
    floor = length * weights / device.read_rate()
    tokens = prompts * group * length
    return {"rows": prompts * group, "tokens_per_second": tokens / seconds, "share_of_reading": floor / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5b", "1.5b"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=int, default=1 << 14, help="token positions of a micro-batch, for both forms")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write the numbers here")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --shapes tiny tries it without")
    device = Device(torch.device(given.device))
    where = torch.cuda.get_device_name() if device.cuda else platform.processor() or platform.machine()
    rate = device.matrix_rate()
    results: dict = {"device": where, "torch": torch.__version__, "matrix_rate": rate, "shapes": {}}
    print(f"{where}, torch {torch.__version__}, bf16 products {rate / 1e12:.4g} T operations/s")
    for shape in given.shapes:
        small = shape == "tiny"
        cases = SMALL if small else CASES
        policy = make_policy(shape, device.device)
        found: dict = {"update": {}, "exactness": measure_exactness(policy, SMALL["tree 4^3 x 8"], given.budget)}
        print(f"\n{shape}: forest against rows, largest difference {found['exactness']}")
        print(f"{'update':28}{'ratio':>8}{'arithmetic':>12}{'positions/s':>13}{'of rate':>9}{'GiB':>7}{'rows GiB':>10}")
        for name, case in cases.items():
            row = measure_update(policy, device, case, given.budget, given.repeats, rate)
            found["update"][name] = row
            print(
                f"{name:28}{row['ratio']:8.2f}{row['arithmetic']:12.2f}{row['positions_per_second']:13,.0f}"
                f"{row['share_of_rate']:9.0%}{row['forest_gib']:7.1f}{row['rows_gib']:10.1f}",
                flush=True,
            )
        sampling = found["sampling"] = measure_sampling(policy, device, small, given.repeats)
        print(
            f"sampling, {sampling['rows']} rows: {sampling['tokens_per_second']:,.0f} tokens/s, "
            f"{sampling['share_of_reading']:.0%} of the floor of reading the weights"
        )
        results["shapes"][shape] = found
        del policy
        if device.cuda:
            torch.cuda.empty_cache()
    if given.json:
        with open(given.json, "w", encoding="utf-8") as out_file:
            json.dump(results, out_file, indent=1)


if __name__ == "__main__":
    main()
