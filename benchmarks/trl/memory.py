"""Peak memory of the update with a large vocabulary in UniAPL and TRL, each in a separate process.

    python benchmarks/trl/memory.py [--vocabulary 151936] [--device cuda] [--bf16] [--json FILE]

The first update is not counted, so that weights and AdamW's moments are already allocated. The result is the
peak of gradients, activations and the head above the memory that the process holds between two updates.
"""

import argparse
import ctypes
import gc
import multiprocessing
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from measure import machine, write
from ours import our_update
from theirs import their_update
from work import Shape, make_work, parse, save_model

VARIANTS: dict[str, dict[str, Any]] = {
    "uniapl, defaults": {},
    "uniapl, one row per micro-batch": {"max_tokens": 1},
    "TRL, defaults": {},
    "TRL, one row per micro-batch": {"micro_batch": 1},
    "TRL, no gradient checkpointing": {"gradient_checkpointing": False},
}


def status(name: str) -> int:
    """Bytes of this process from Linux' /proc: VmRSS for the current size, VmHWM for the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measure(variant: str, shape: Shape, folder: Path, options: Namespace, sender: Any) -> None:
    """Send the memory and time of the second update, and its loss and gradient norm."""
    torch.set_num_threads(options.threads)
    make = our_update if variant.startswith("uniapl") else their_update
    step, model = make(make_work(shape), folder, options, **VARIANTS[variant])
    step()
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        # Freed memory that the allocator keeps would hide a part of the peak. Writing 5 resets VmHWM.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
    start = time.perf_counter()
    loss, norm = step()
    took = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else status("VmHWM")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    sender.send(
        {"bytes": peak - before, "seconds": took, "loss": loss, "grad_norm": norm, "weights": weights}
    )


def main() -> None:
    """Print and write the peak of each configuration, with its gradient norm as a check of equal work."""
    if sys.platform != "linux":
        raise SystemExit("this benchmark needs Linux: it reads the peak memory from /proc")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument(
        "--length", type=int, default=128, help="tokens of each prompt and of the longest completion"
    )
    options = parse(parser)
    shape = Shape(
        model="thin",
        prompts=options.prompts,
        prompt_length=options.length,
        completion_length=options.length,
        vocabulary=options.vocabulary,
    )
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(shape, Path(name) / "model")
        for variant in VARIANTS:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(variant, shape, folder, options, sender))
            process.start()
            sender.close()
            try:
                rows.append({"name": variant, **receiver.recv()})
            except EOFError:
                raise SystemExit(
                    f"{variant}: the process exited without a result; it may have run out of memory"
                ) from None
            finally:
                process.join()
            found = rows[-1]
            times = found["bytes"] / found["weights"]
            print(
                f"{variant:>26}: peak {found['bytes'] / 2**30:5.2f} GiB, {times:.1f} times the weights; "
                f"{found['seconds']:.1f} s, gradient norm {found['grad_norm']:.6f}",
                flush=True,
            )
    tables = [{"title": f"peak memory, V = {shape.vocabulary:,}", "shape": vars(shape), "rows": rows}]
    write("memory", options, machine(options), tables)


if __name__ == "__main__":
    main()
