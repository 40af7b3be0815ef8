"""vLLM: what is said to its servers and how their answers are read. `docs/vllm.md` is the manual.

A server runs `server/stepcredit_worker.py` in its workers, whose methods are called by `/collective_rpc`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import torch

from stepcredit.config import Config
from stepcredit.errors import UserError
from stepcredit.learn.placement import Placement
from stepcredit.policy.forward import Policy
from stepcredit.samplers.base import sampler
from stepcredit.samplers.options import SamplerOptions
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.remote.connection import Retry, Server
from stepcredit.samplers.remote.dialect import Completion, Dialect, Place, Request, Start
from stepcredit.samplers.remote.sampler import RemoteSampler, remote_sampler

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
ON_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB; other devices ignore them
ALWAYS = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}

# A server draws completion i with seed + i. Odd, so that other seeds stay others, and seeds that follow each other come
# to lie far apart. On GPUs a server reads all of a seed, on CPUs, as torch does there, the lower 32 bits.
SPACING = 0xD1342543DE82EF95
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}

RPC, RESET = "/collective_rpc", "/reset_prefix_cache?reset_running_requests=true"
SLEEP, WAKE, ASLEEP = "/sleep", "/wake_up", "/is_sleeping"
DEVELOPMENT = (RPC, RESET, SLEEP, WAKE)  # paths of VLLM_SERVER_DEV_MODE
LASTING = (RPC, SLEEP, WAKE)  # paths whose failures, with status 500, too, stay
LOAD_ADAPTER, UNLOAD_ADAPTER = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
EXTENSION_HINT = "; is it started with --worker-extension-cls (docs/vllm.md)?"
ADAPTER_HINT = "; is it started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (docs/vllm.md)?"
SLEEP_HINT = (
    "; is it started with --enable-sleep-mode, and does its GPU have room for it beside the trainer (a smaller "
    "--gpu-memory-utilization)? --sampler.server.sleep off leaves it awake"
)
OTHER_MODEL = (
    "If most tokens are concerned, the server has other weights, an output layer that was not renewed, another type of "
    "numbers or, at a temperature other than 1, lacks --logprobs-mode processed_logprobs; if few are, its prefix cache "
    "is of other weights (docs/vllm.md)"
)


class VLLM(Dialect):
    name = "vLLM"
    manual = "docs/vllm.md"
    health_path = "/health"
    completions_path = "/v1/completions"
    metrics_path = "/metrics"
    cache_counters = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")

    # ------------------------------------------------------------------ a server of the run's own

    def command(self, start: Start) -> list[str]:
        command = [start.python, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", start.model, "--served-model-name", "policy"]
        command += ["--host", "127.0.0.1", "--port", str(start.port), "--enable-prefix-caching"]
        command += ["--generation-config", "vllm", "--worker-extension-cls", "stepcredit_worker.Extension"]
        if start.dtype != "auto":
            command += ["--dtype", start.dtype]
        if start.params.temperature not in (0, 1) and not start.params.truncates:
            command += ["--logprobs-mode", "processed_logprobs"]
        if not torch.cuda.is_available():  # on CPUs vLLM 0.32 dies when it cuts the prompt of a request with a seed
            command += ["--no-enable-chunked-prefill"]
        if start.sleeps:
            command += ["--enable-sleep-mode"]
        if start.memory is not None:
            command += ["--gpu-memory-utilization", f"{start.memory:.2f}"]
        return [*command, *lora_args(start.lora_rank), *start.args]

    def environment(self, own: Mapping[str, str]) -> dict[str, str]:
        return {**ON_CPU, **own, **ALWAYS}

    # ------------------------------------------------------------------ requests and answers

    def gives_full_logprobs(self, params: SamplingParams) -> bool:
        """They are of temperature 1 before top-p and top-k, or, where the server was started for it, of the sampling
        temperature after them (processed_logprobs): at other temperatures with top-p or top-k they are of neither use.
        """
        return params.temperature in (0, 1) or not params.truncates

    def number_asked(self, params: SamplingParams, n: int) -> int:
        """vLLM refuses several greedy ones."""
        return 1 if params.temperature == 0 else n

    def body(self, request: Request, model: str) -> dict[str, Any]:
        params = request.params
        return {
            "prompt": request.prompt,
            "n": request.number,
            "max_tokens": request.limit,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "seed": request.seed * SPACING % 2**62,
            "stop_token_ids": list(request.stop),
            "ignore_eos": True,  # the ids above are all that stops
            "logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            **NEUTRAL,
            "model": model,
        }

    def read(self, answer: Mapping[str, Any]) -> list[Completion]:
        choices = sorted(answer.get("choices") or (), key=lambda choice: choice["index"])
        return [
            Completion(
                token_ids=choice.get("token_ids") or [],
                logprobs=(choice.get("logprobs") or {}).get("token_logprobs") or [],
                finish=choice.get("finish_reason"),
            )
            for choice in choices
        ]

    # ------------------------------------------------------------------ what a server says of itself

    def models(self, server: Server) -> list[str]:
        rows = server.get("/v1/models").json()["data"]
        return [rows[0]["id"], *(str(row["id"]) for row in rows[1:])]

    def text(self, server: Server, token_ids: list[int]) -> str | None:
        return server.post("/detokenize", {"model": server.model, "tokens": token_ids}).get("prompt")

    def is_temporary(self, path: str, status: int) -> bool:
        """A worker's failure comes with status 500, too, and stays."""
        return status >= 500 and path.split("?")[0] not in LASTING

    def refusal(self, path: str, body: Mapping[str, Any], status: int, text: str) -> str:
        if status == 404 and path.startswith(DEVELOPMENT):
            return f" has no {path}; start it with VLLM_SERVER_DEV_MODE=1 (docs/vllm.md)"
        hint = SLEEP_HINT if path.startswith((SLEEP, WAKE)) else ""
        if path in (LOAD_ADAPTER, UNLOAD_ADAPTER):
            hint = ADAPTER_HINT
        elif path == RPC and (body["method"] == "stepcredit_loaded" or "no attribute" in text):
            hint = EXTENSION_HINT  # any other failure is one of a method that is there
        return super().refusal(path, body, status, text) + hint

    # ------------------------------------------------------------------ weights

    def call_workers(self, server: Server, method: str, *args: str) -> list[Any]:
        results = list(server.post(RPC, {"method": method, "args": list(args)}).get("results") or ())
        errors = [str(result["error"])[:300] for result in results if isinstance(result, dict) and "error" in result]
        if errors:
            raise UserError(f"sampler: a worker of {server.url} has failed ({'; '.join(dict.fromkeys(errors))})")
        return results

    def versions(self, server: Server) -> set[str]:
        return {str(version) for version in self.call_workers(server, "stepcredit_loaded")}

    def places(self, server: Server, folder: Path) -> list[Place]:
        found = self.call_workers(server, "stepcredit_place", str(folder))
        if not all(isinstance(place, dict) for place in found):
            return []
        return [
            Place(
                gpu=str(place.get("gpu") or ""),
                sees_folder=bool(place.get("sees")),
                is_heard=bool(place.get("heard")),
                dtype=str(place.get("dtype") or ""),
            )
            for place in found
        ]

    def load_folder(self, server: Server, folder: Path, version: str) -> None:
        self.call_workers(server, "stepcredit_load", str(folder), version)

    def forget(self, server: Server) -> bool:
        return server.post(RESET, {}).get("success") is not False

    def commit(self, server: Server, version: str) -> bool:
        return bool(self.call_workers(server, "stepcredit_commit", version))

    # ------------------------------------------------------------------ memory

    def is_asleep(self, server: Server) -> bool:
        """Not one without the development endpoints: nobody could have made it sleep."""
        try:
            answer = server.get(ASLEEP)
            return answer.status_code == 200 and bool(answer.json().get("is_sleeping"))
        except (AttributeError, httpx.TransportError, ValueError) as error:
            raise Retry(f"{server.url}{ASLEEP} does not answer ({type(error).__name__})") from error

    def sleep(self, server: Server, level: int) -> None:
        server.tell(f"{SLEEP}?level={level}", {})

    def wake(self, server: Server, what: str) -> None:
        server.tell(f"{WAKE}?tags={what}", {})

    # ------------------------------------------------------------------ adapters

    def load_adapter(self, server: Server, name: str, folder: Path) -> None:
        server.tell(LOAD_ADAPTER, {"lora_name": name, "lora_path": str(folder)})  # it answers in words

    def unload_adapter(self, server: Server, name: str) -> None:
        server.tell(UNLOAD_ADAPTER, {"lora_name": name})


def lora_args(rank: int) -> list[str]:
    """What lets a server take adapters of this rank."""
    if rank == 0:
        return []
    fitting = [one for one in LORA_RANKS if one >= rank]
    if not fitting:
        raise UserError(f"lora.rank: vLLM takes adapters up to rank {LORA_RANKS[-1]}, got {rank}")
    return ["--enable-lora", "--max-lora-rank", str(fitting[0])]


def why_no_logprobs(options: SamplerOptions) -> str:
    """See `VLLM.gives_full_logprobs`."""
    if VLLM().gives_full_logprobs(options):
        return ""
    return (
        f"sampler.top_p {options.top_p:g}, sampler.top_k {options.top_k} at sampler.temperature "
        f"{options.temperature:g}: vLLM gives no log-probabilities of the full distribution at that temperature; take "
        "--sampler.top-p 1 --sampler.top-k 0, or --sampler.temperature 1, or --sampler.name transformers"
    )


@sampler(
    columns=("rollout_logprobs",),
    elsewhere=True,
    copies_when_sharded=False,
    why_no_logprobs=why_no_logprobs,
    other_model=OTHER_MODEL,
)
def build(config: Config, policy: Policy, placement: Placement) -> RemoteSampler:
    """Servers of vLLM, as `sampler.server` has them."""
    return remote_sampler(VLLM(), config, policy, placement)
