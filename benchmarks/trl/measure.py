"""Measure interleaved run times and the machine's limits, and write the results as tables and JSON."""

import json
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel
from work import Shape


def seconds(run: Callable[[], Any], device: str) -> float:
    """Time one call in seconds; on a GPU, wait until its kernels have finished."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    sides: Mapping[str, Callable[[], Any]], options: Namespace, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each repeat by side.

    The sides run in turn, so that other load on the machine affects all of them equally.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(warm_up + options.repeats):
        for name, run in sides.items():
            took = seconds(run, options.device)
            if repeat >= warm_up:
                found[name].append(took)
    return found


def machine(options: Namespace) -> dict[str, Any]:
    """Describe the machine: cores, package versions, and its measured peak compute and copy rates."""
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    size = 8192 if options.device == "cuda" else 1536
    left = torch.randn(size, size, device=options.device, dtype=dtype)
    source = torch.zeros(2**28, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)

    def best(run: Callable[[], Any]) -> float:
        return min(seconds(run, options.device) for _ in range(6))

    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "cores": os.cpu_count(),
        "threads": options.threads,
        "precision": "bf16" if options.bf16 else "fp32",
        "matmul_flops": 2 * size**3 / best(lambda: left @ left),
        "copy_bytes": 2 * source.nbytes / best(lambda: target.copy_(source)),
        **{name: version(name) for name in ("uniapl", "trl", "transformers", "torch", "accelerate")},
    }


def _token_flops(model: PreTrainedModel) -> tuple[float, float, float]:
    """FLOPs of one token's forward pass: the layers, the head, and attention to one preceding token."""
    config = model.config.get_text_config()
    embeddings = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    layers = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 2 * layers, 2 * config.vocab_size * config.hidden_size, attention


def update_work(
    model: PreTrainedModel, prompt_lengths: Sequence[int], lengths: Sequence[int]
) -> tuple[float, float]:
    """Minimum FLOPs and bytes of an update: each prompt is processed once, the head only for completions.

    The backward pass costs twice the forward pass. The bytes count two reads of the weights, one write and
    two reads of the gradient, and AdamW's reads and writes of weights and moments.
    """
    layer, head, attention = _token_flops(model)
    flops = sum(layer * length + attention * length**2 / 2 for length in prompt_lengths)
    generations = len(lengths) // len(prompt_lengths)
    for row, length in enumerate(lengths):
        contexts = length * prompt_lengths[row // generations] + length**2 / 2
        flops += (layer + head) * length + attention * contexts
    return 3 * flops, 4.0 * 11 * sum(p.numel() for p in model.parameters())


def rollout_work(
    model: PreTrainedModel, prompt_lengths: Sequence[int], lengths: Sequence[int], *, bf16: bool
) -> tuple[float, float]:
    """Minimum FLOPs and bytes of sampling.

    Each prompt and each completion token is processed once. All weights are read at every step of the
    longest completion, and each row's keys and values at each of its own steps. If the weights stay in the
    processor's cache, the actual traffic can be below these bytes.
    """
    layer, head, attention = _token_flops(model)
    config = model.config.get_text_config()
    size = 2 if bf16 else 4
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    flops = sum(layer * length + attention * length**2 / 2 for length in prompt_lengths)
    moved = max(lengths) * size * sum(p.numel() for p in model.parameters())
    generations = len(lengths) // len(prompt_lengths)
    for row, length in enumerate(lengths):
        contexts = length * prompt_lengths[row // generations] + length**2 / 2
        flops += (layer + head) * length + attention * contexts
        moved += cached * contexts
    return flops, moved


def table(
    title: str,
    shape: Shape,
    times: Mapping[str, Sequence[float]],
    *,
    reference: str,
    work: tuple[float, float] | None,
    limits: Mapping[str, Any],
    uncounted: Collection[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """Print one table of results and return it.

    Args:
        reference: The side that others are compared with: "times" is their time divided by its time.
        work: Minimum FLOPs and bytes of the work; None if they have not been counted.
        uncounted: Sides that do more than this work; their roofline efficiency is not computed.
    """
    middle = {name: statistics.median(values) for name, values in times.items()}
    least = max(work[0] / limits["matmul_flops"], work[1] / limits["copy_bytes"]) if work else None
    rows = [
        {
            "name": name,
            "median": middle[name],
            "low": min(values),
            "high": max(values),
            "times": middle[name] / middle[reference],
            "of_limit": least / middle[name] if least and name not in uncounted else None,
        }
        for name, values in times.items()
    ]
    print(f"\n{title}: {asdict(shape)}")
    for row in rows:
        limit = f"{row['of_limit']:7.1%} of roofline" if row["of_limit"] else ""
        print(
            f"{row['name']:>34}: {row['median']:8.3f} s ({row['low']:.3f} to {row['high']:.3f})"
            f"  {row['times']:5.2f} x {reference} {limit}",
            flush=True,
        )
    floors = {"flops": work[0], "bytes": work[1], "least_seconds": least} if work else {}
    return {"title": title, "shape": asdict(shape), "reference": reference, "rows": rows, **floors, **more}


def write(
    benchmark: str, options: Namespace, limits: Mapping[str, Any], tables: list[dict[str, Any]]
) -> None:
    """Print the machine's description, and write the results to the file given by `--json`."""
    print(
        f"\n{limits['device']}, {limits['cores']} cores, {limits['threads']} threads, {limits['precision']}: "
        f"{limits['matmul_flops'] / 1e9:.0f} GFLOP/s, {limits['copy_bytes'] / 1e9:.1f} GB/s"
    )
    if options.json:
        text = json.dumps({"benchmark": benchmark, "machine": dict(limits), "tables": tables}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
