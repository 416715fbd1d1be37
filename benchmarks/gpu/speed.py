"""Speed and peak memory of UniAPL and TRL in bf16, at the size of Qwen3-0.6B: update, rollouts and steps.

TRL samples without vLLM. Both sides get the same work: the same tokens in the update, and completions of the
same planned lengths in rollouts and steps.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from measure import machine, seconds, update_work
from ours import our_stage, our_update
from rollouts import our_sampler
from stage import Report, parse, peak_memory, sized
from step import STEADY, our_run, their_run
from theirs import BEST, their_sampler, their_update
from work import Shape, Work, make_work, save_model

from uniapl.training.preflight.memory import estimate_memory

SHAPE = Shape(
    model="qwen3-0.6b",
    prompts=8,
    generations=8,
    prompt_length=512,
    completion_length=1024,
    vocabulary=151_936,
)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s in the vendor's data sheets, by a part of the device's name."""
TARGETS = {
    "update, utilisation of FLOPs": 0.35,
    "update, speed relative to TRL": 1.5,
    "rollouts, speed relative to TRL": 4.0,
}
Make = Callable[[], Callable[[], Any]]
"""Builds a side; returns the function to time."""


def measured(make: Make, repeats: int, options: Namespace) -> dict[str, Any]:
    """Seconds of each repeat after one that is not counted, and the peak memory of the side."""
    with peak_memory(options) as memory:
        try:
            run = make()
            run()
            times = [seconds(run, options.device) for _ in range(repeats)]
        except Exception as error:  # a side that does not fit in memory must not hide the other sides
            return {"error": f"{type(error).__name__}: {error}"[:300]}
        finally:
            run = None
    return {"seconds": median(times), "low": min(times), "high": max(times), **memory}


def updates(report: Report, work: Work, folder: Path, options: Namespace, peak: float) -> dict[str, float]:
    """Time the update; return the seconds of each side."""
    longest = work.shape.prompt_length + work.shape.completion_length
    _, stage, _ = our_stage(work, folder, options)
    flops, _ = update_work(stage.model, [*map(len, work.prompts)], work.lengths)
    tokens = sum(map(len, work.prompts)) * work.shape.generations + sum(work.lengths)
    report.set(packing=stage.packing, update_flops=flops, update_tokens=tokens)
    del stage
    sides: dict[str, Make] = {
        "uniapl, defaults": lambda: our_update(work, folder, options)[0],
        "uniapl, 32 rows": lambda: our_update(work, folder, options, max_tokens=32 * longest)[0],
        "TRL, defaults": lambda: their_update(work, folder, options)[0],
        "TRL, no gradient checkpointing": lambda: their_update(work, folder, options, micro_batch=4, **BEST)[
            0
        ],
    }
    found: dict[str, float] = {}
    for name, make in sides.items():
        values = measured(make, options.repeats, options)
        if "seconds" in values:
            found[name] = values["seconds"]
            values |= {"tokens_per_second": tokens / found[name], "mfu": flops / found[name] / peak}
        report.row(f"update: {name}", **values)
    return found


def samplers(report: Report, work: Work, folder: Path, options: Namespace) -> dict[str, float]:
    """Time the rollouts; return the seconds of each side."""
    sides: dict[str, tuple[Make, int]] = {
        "uniapl": (lambda: our_sampler(work, folder, options)[0], options.repeats),
        # One repeat takes about half a minute.
        "TRL": (lambda: their_sampler(work, folder, options)[0], 1),
    }
    found: dict[str, float] = {}
    for name, (make, repeats) in sides.items():
        values = measured(make, repeats, options)
        if "seconds" in values:
            found[name] = values["seconds"]
            values["tokens_per_second"] = sum(work.lengths) / found[name]
        report.row(f"rollouts: {name}", **values)
    return found


def steps(report: Report, shape: Shape, folder: Path, options: Namespace) -> None:
    """Time complete steps, with the peak memory of each side and the estimate of `check`."""
    # A third of the length keeps TRL's steps within the time of this stage.
    shape = replace(shape, completion_length=max(16, shape.completion_length // 4))
    ours = {"uniapl, grpo": {}, "uniapl, uniapl": STEADY}
    for name, changes in ours.items():
        run = our_run(shape, folder, options, **changes)
        report.row(
            f"step: {name}",
            **step_of(run, options),
            estimated_bytes=estimate(shape, folder, options, changes),
        )
    report.row("step: TRL", **step_of(their_run(shape, folder, options, 8, **BEST), options))


def step_of(run: Callable[[], list[dict[str, float]]], options: Namespace) -> dict[str, Any]:
    with peak_memory(options) as memory:
        try:
            records = run()
        except Exception as error:  # as in `measured`
            return {"error": f"{type(error).__name__}: {error}"[:300]}
    return {name: median(record[name] for record in records) for name in records[0]} | memory


def estimate(shape: Shape, folder: Path, options: Namespace, changes: dict[str, Any]) -> int:
    """Bytes at the peak of the step, as `uniapl check` estimates them."""
    accelerator, stage, inputs = our_stage(make_work(shape), folder, options, **changes)
    return estimate_memory(stage.config, inputs, accelerator.device).peak


def targets(report: Report, update: dict[str, float], rollouts: dict[str, float]) -> list[dict[str, Any]]:
    """Each target with its value, from the fastest settings of each side; a missing side has no value."""
    ours, theirs = (
        [
            min((took for name, took in times.items() if name.startswith(side)), default=None)
            for times in (update, rollouts)
        ]
        for side in ("uniapl", "TRL")
    )
    values = {
        "update, utilisation of FLOPs": ours[0]
        and report.found["update_flops"] / ours[0] / report.found["peak_flops"],
        "update, speed relative to TRL": ours[0] and theirs[0] and theirs[0] / ours[0],
        "rollouts, speed relative to TRL": ours[1] and theirs[1] and theirs[1] / ours[1],
    }
    return [
        {"name": name, "value": value, "target": TARGETS[name], "met": bool(value and value >= TARGETS[name])}
        for name, value in values.items()
    ]


def main() -> None:
    """Measure update, rollouts and steps, in this order."""
    options = parse()
    report = Report("speed", options)
    shape = sized(SHAPE, options)
    limits = machine(options)
    peak = next((f for part, f in PEAK_FLOPS.items() if part in limits["device"]), limits["matmul_flops"])
    report.set(machine=limits, shape=vars(shape), peak_flops=peak)
    options.steps = 2
    work = make_work(shape)
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(shape, Path(name) / "model", device=options.device)
        update = updates(report, work, folder, options, peak)
        rollouts = samplers(report, work, folder, options)
        steps(report, shape, folder, options)
    if not options.tiny:
        report.set(targets=targets(report, update, rollouts))
    report.finish()


if __name__ == "__main__":
    main()
