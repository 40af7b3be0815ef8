"""What all stages share: cases whose results are kept at once, time, memory, and rates of the device."""

import gc
import importlib.metadata
import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stepcredit.forest.ops import out_of_memory

PACKAGES = ("stepcredit", "torch", "transformers", "triton", "peft", "trl", "accelerate", "vllm")

Numbers = dict[str, Any]


@dataclass
class Bench:
    """A run of one stage.

    Args:
        device, shapes, repeats: as given.
        budget: token positions of a micro-batch.
        file: the results, a JSON object: `machine`, and for each stage its cases by name. None: they are only printed.
        only: cases whose name holds one of these texts alone; none: all.
        again: cases that are in the file already too.
    """

    stage: str
    device: torch.device
    shapes: list[str]
    repeats: int = 3
    budget: int = 1 << 14
    file: Path | None = None
    only: Sequence[str] = ()
    again: bool = False
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        kept = json.loads(self.file.read_text(encoding="utf-8")) if self.file and self.file.exists() else {}
        here = machine(self.device)
        if kept and kept["machine"]["name"] != here["name"]:
            raise SystemExit(f"{self.file} has results of {kept['machine']['name']}; name another file")
        self.results: dict[str, Any] = {**kept, "machine": here}
        self.cases: dict[str, Numbers] = self.results.setdefault(self.stage, {})

    @property
    def small(self) -> bool:
        """Whether this only tries the script out."""
        return self.shapes == ["tiny"]

    def case(self, name: str, run: Callable[[], Numbers | None]) -> None:
        """Run a case, print what it gives, and keep it in the file. One that fails is kept with its error."""
        wanted = not self.only or any(text in name for text in self.only)
        if not wanted or (self.cases.get(name, {}).get("ok") and not self.again):
            return
        print(f"{self.stage}: {name} ...", flush=True)
        started = time.perf_counter()
        try:
            row: Numbers = {"ok": True, **(run() or {})}
        except Exception as error:  # whatever it is, the next case is to run
            lines = traceback.format_exception(error)
            row = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000], "traceback": "".join(lines)[-4000:]}
            self.failed.append(name)
        row["took_s"] = time.perf_counter() - started
        self.cases[name] = row
        self.save()
        shown = {key: value for key, value in row.items() if key not in ("traceback", "kernels")}
        print("  " + "  ".join(f"{key} {short(value)}" for key, value in shown.items()), flush=True)
        self.free()

    def save(self) -> None:
        """The whole file anew, in one step."""
        if self.file:
            partial = self.file.with_name(f".{self.file.name}.part")
            partial.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, self.file)

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def halving(self, run: Callable[[int], Numbers], size: int, what: str, least: int = 1) -> Numbers:
        """Run with a size, and with half of it as often as it is out of memory; the numbers say with which."""
        first = size
        while True:
            try:
                found = run(size)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or size // 2 < least:
                    raise
            else:
                return found | {what: size} | ({f"{what}_out_of_memory": first} if size != first else {})
            self.free()
            print(f"  out of memory with {what} {size:,}; {size // 2:,} now", flush=True)
            size //= 2

    # ------------------------------------------------------------------ time and memory

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repeats: int | None = None) -> float:
        """Least seconds, after one call that warms up."""
        least = float("inf")
        for number in range((repeats or self.repeats) + 1):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            least = min(least, time.perf_counter() - started) if number else least
        return least

    def peak_gib(self, run: Callable[[], object]) -> float | None:
        """What a call adds at most; None, without a call, where that cannot be asked."""
        if self.device.type != "cuda":
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def matrix_rate(self) -> float:
        """Operations a second of a large product in bf16."""
        size = 8192 if self.device.type == "cuda" else 512
        left, right = torch.randn(2, size, size, device=self.device, dtype=torch.bfloat16)
        return 2 * size**3 / self.seconds(lambda: left @ right, 10)

    def read_rate(self) -> float:
        """Bytes a second of reading memory."""
        values = torch.ones(2**31 if self.device.type == "cuda" else 2**24, device=self.device, dtype=torch.uint8)
        words = values.view(torch.float32)
        return len(values) / self.seconds(lambda: words.sum(), 10)

    def rates(self) -> Numbers:
        return {"operations_per_second": self.matrix_rate(), "bytes_read_per_second": self.read_rate()}

    def kernels(self, run: Callable[[], object], rows: int = 25) -> Numbers:
        """The kernels, or on a CPU the operators, that take most of a call."""
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device.type == "cuda"
        run()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]) as profiled:
            run()
            self.wait()
        name = "self_device_time_total" if cuda else "self_cpu_time_total"
        events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, name))
        total = sum(getattr(event, name) for event in events)
        table = [
            {"name": event.key[:160], "calls": event.count, "ms": getattr(event, name) / 1000}
            for event in events[:rows]
        ]
        return {"kernel_ms": total / 1000, "launches": sum(event.count for event in events), "kernels": table}


def machine(device: torch.device) -> Numbers:
    """Where this runs, and with what."""
    found: Numbers = {"name": platform.processor() or platform.machine(), "python": platform.python_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"name": properties.name, "memory_gib": properties.total_memory / 2**30, "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
