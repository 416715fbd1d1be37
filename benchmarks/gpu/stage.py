"""What the stages share: their arguments, and a report that is written after every entry."""

import argparse
import gc
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from work import Shape


class Report:
    """The results of a stage; each entry is printed and written to the stage's JSON file at once."""

    def __init__(self, name: str, options: Namespace) -> None:
        self.path: Path = options.output / f"gpu_{name}.json"
        device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
        self.found: dict[str, Any] = {
            "benchmark": f"gpu_{name}",
            "device": device,
            "tiny": options.tiny,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "checks": [],
            "rows": [],
        }

    def check(self, name: str, value: float, bound: float, *, at_least: bool = False) -> None:
        """Record a value that must be at most `bound`, or at least `bound`. NaN fails."""
        passed = bool(value >= bound if at_least else value <= bound)
        relation = "at least" if at_least else "at most"
        print(f"{'ok    ' if passed else 'FAILED'} {name}: {value:.3g}, {relation} {bound:g}", flush=True)
        self.found["checks"].append(
            {"name": name, "value": value, "bound": bound, "relation": relation, "passed": passed}
        )
        self._write()

    def row(self, name: str, **values: Any) -> None:
        """Record measured values."""
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"       {name}: {shown}", flush=True)
        self.found["rows"].append({"name": name} | values)
        self._write()

    def set(self, **values: Any) -> None:
        """Record values of the whole stage."""
        self.found |= values
        self._write()

    def finish(self) -> None:
        """Exit with 1 if a check failed."""
        sys.exit(any(not check["passed"] for check in self.found["checks"]))

    def _write(self) -> None:
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def parse() -> Namespace:
    """The arguments of a stage, which `check.py` passes to all of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--recipe", type=Path)
    options = parser.parse_args()
    options.device = "cpu" if options.tiny else "cuda"
    options.bf16, options.threads, options.repeats = True, 1, 1 if options.tiny else 3
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU; --tiny runs all stages with tiny models on the CPU")
    if options.tiny:
        torch.set_num_threads(1)
    return options


def sized(shape: Shape, options: Namespace) -> Shape:
    """The shape, or with --tiny a small one with as many prompts and generations at most."""
    if not options.tiny:
        return shape
    return Shape(
        model="thin",
        prompts=min(shape.prompts, 2),
        generations=min(shape.generations, 4),
        prompt_length=12,
        completion_length=16,
        vocabulary=512,
    )


@contextmanager
def peak_memory(options: Namespace) -> Iterator[dict[str, int | None]]:
    """Yield a dict that holds `peak_bytes` of the GPU afterwards; None on a CPU."""
    found: dict[str, int | None] = {"peak_bytes": None}
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if options.device == "cuda":
        torch.cuda.synchronize()
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
