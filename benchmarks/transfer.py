"""Seconds to pass weights on to a vLLM server of this machine, by folder and by broadcast, in one run.

The floor is a copy of as many bytes in memory: trainer and server each have to make one.

python benchmarks/transfer.py --python PYTHON OF THE ENVIRONMENT WITH VLLM [--layers 24] [--ways folder gloo] [-- ARGS]
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import load_policy, save_policy
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.remote.dialect import Start
from stepcredit.samplers.remote.launch import LocalServer
from stepcredit.samplers.remote.options import ServerOptions
from stepcredit.samplers.remote.sampler import RemoteSampler
from stepcredit.samplers.remote.vllm import VLLM


def make_policy(layers: int) -> Policy:
    """A Qwen3 of the width of Qwen2.5-0.5B with random weights and the embedded model's vocabulary."""
    tokenizer = load_policy("embedded", "cpu").tokenizer
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Policy(Qwen3ForCausalLM(config), tokenizer)


def best(work, repeats: int) -> float:
    least = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - started)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="interpreter of the environment with vLLM; this one without")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=["folder", "gloo", "nccl"], default=["folder", "gloo"])
    parser.add_argument("args", nargs="*", help="further ones of the server, after --")
    given = parser.parse_args()
    policy = make_policy(given.layers)
    tensors = list(policy.parameters())
    size = sum(one.numel() * one.element_size() for one in tensors)
    copy = best(lambda: [one.detach().clone() for one in tensors], given.repeats)
    print(f"{size / 2**30:.2f} GiB; a copy of it in memory takes {copy:.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        save_policy(policy, Path(folder) / "model")
        file = Path(folder) / "server.log"
        python = given.python or sys.executable
        start = Start(f"{folder}/model", "float32", SamplingParams(), python, args=given.args)
        server = LocalServer(VLLM(), start, file)
        try:
            for way in given.ways:
                sampler = RemoteSampler(VLLM(), policy, [server.url], ServerOptions(transfer=way))
                taken = best(lambda sampler=sampler: sampler.sync(policy), given.repeats)
                print(f"{way:8}{taken:8.2f} s {size / 2**30 / taken:8.2f} GiB/s {taken / copy:8.1f} copies", flush=True)
                sampler.close()
        finally:
            server.close()


if __name__ == "__main__":
    main()
