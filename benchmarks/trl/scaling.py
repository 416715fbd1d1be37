"""Scaling of rollouts and update with G, prompt length, spread of completion lengths, vocabulary and threads.

python benchmarks/trl/scaling.py [--over generations threads] [--device cuda] [--json FILE]
"""

import argparse
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import interleaved, machine, rollout_work, table, update_work, write
from ours import our_update
from rollouts import our_sampler
from theirs import BEST, their_sampler, their_update
from work import Shape, make_work, parse, save_model

BASE = Shape(prompts=2, prompt_length=64, completion_length=64)
AXES: dict[str, tuple[float, ...]] = {
    "generations": (2, 4, 8, 16),
    "prompt_length": (16, 64, 256),
    "spread": (0.0, 0.3, 0.6, 1.0),
    "vocabulary": (2_000, 32_000, 151_936),
    "threads": (1, 2),
}


def point(axis: str, value: Any, options: Namespace, limits: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure rollouts and update of both libraries at one value of an axis."""
    shape = BASE if axis == "threads" else replace(BASE, **{axis: value})
    torch.set_num_threads(value if axis == "threads" else options.threads)
    work = make_work(shape)
    prompts = [*map(len, work.prompts)]
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(shape, Path(name) / "model")
        sample, model = our_sampler(work, folder, options)
        update, _ = our_update(work, folder, options)
        their_sample, _ = their_sampler(work, folder, options)
        their_step, _ = their_update(work, folder, options, micro_batch=shape.rows, **BEST)
        pairs = {
            "rollouts": (sample, their_sample, rollout_work(model, prompts, work.lengths, bf16=options.bf16)),
            "update": (update, their_step, update_work(model, prompts, work.lengths)),
        }
        return [
            table(
                f"{what}, {axis} = {value}",
                shape,
                interleaved({"uniapl": ours, "TRL": theirs}, options),
                reference="uniapl",
                work=floor,
                limits=limits,
                what=what,
                axis=axis,
                value=value,
            )
            for what, (ours, theirs, floor) in pairs.items()
        ]


def main() -> None:
    """Measure all values of the selected axes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--over", nargs="+", choices=tuple(AXES), default=[*AXES])
    options = parse(parser)
    limits = machine(options)
    tables = [
        found
        for axis in options.over
        for value in AXES[axis]
        for found in point(axis, value, options, limits)
    ]
    write("scaling", options, limits, tables)


if __name__ == "__main__":
    main()
