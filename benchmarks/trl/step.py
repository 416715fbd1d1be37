"""The whole step: sampling, rewards, advantages, update, by `uniapl.train` and by `GRPOTrainer.train`.

    python benchmarks/trl/step.py [--models 20m] [--steps 4] [--bf16] [--device cuda] [--json FILE]

Each repeat is a short run of every side, one after the other; a run's first step is not counted. Beside GRPO,
a step of the method `uniapl` with its default settings: demonstrations, discriminator and KL on top.
"""

import argparse
import contextlib
import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import machine, rollout_work, table, update_work, write
from ours import recipe
from planned import Plan, our_sampler_planned
from theirs import BEST, make_trainer
from transformers import TrainerCallback
from work import (
    Shape,
    chosen_shapes,
    data_rows,
    load,
    parse,
    planned_lengths,
    random_reward,
    save_model,
    shapes,
)

import uniapl
from uniapl.config import DataConfig
from uniapl.config.resolve import merge
from uniapl.data.rows import tokenize_row

STEADY = {
    # As a long run is most of the time: the discriminator past its warm-up, the KL's reference in use.
    "method": "uniapl",
    "objective": {"reference_step": 0},
    "discriminator": {"warmup_steps": 0},
}
LESS = {
    "one discriminator update": STEADY | {"discriminator": {"warmup_steps": 0, "updates_per_step": 1}},
    "no discriminator": STEADY | {"objective": {"reference_step": 0, "lambda_adv": 0.0}},
}
"""What of the method's price is whose."""
PARTS = ("rollout", "reward", "score", "update", "discriminator")


class Clock(TrainerCallback):
    """Seconds of each of TRL's optimizer steps, generation included."""

    def __init__(self, device: str) -> None:
        self.device, self.times = device, []

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = self.now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(self.now() - self.start)


Run = Callable[[], list[dict[str, float]]]
"""A short run -> of each step but the first: "step", and the parts where they are known."""


def our_run(shape: Shape, folder: Path, options: Namespace, **changes: Any) -> Run:
    steps = options.steps + 1
    rows = data_rows(shape, steps * shape.prompts)
    directory = folder.parent / f"uniapl-{len(changes)}"
    values = merge(recipe(shape, folder, options), changes)
    values |= {"output_dir": str(directory), "overwrite": True, "max_steps": steps, "save_steps": steps}
    values["logging_steps"] = steps
    lengths = planned_lengths(shape, steps * shape.rows)

    def run() -> list[dict[str, float]]:
        with our_sampler_planned(Plan(lengths)), contextlib.redirect_stdout(None):
            uniapl.train(values, train_dataset=rows, reward_functions=[random_reward])
        records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        return [
            {"step": r["step_time"]} | {p: r[f"time/{p}"] for p in PARTS if f"time/{p}" in r}
            for r in records[1:]
        ]

    return run


def their_run(shape: Shape, folder: Path, options: Namespace, micro_batch: int, **settings: Any) -> Run:
    steps = options.steps + 1
    rows = [{"prompt": row["prompt"]} for row in data_rows(shape, steps * shape.prompts)]
    lengths = planned_lengths(shape, steps * shape.rows)

    def run() -> list[dict[str, float]]:
        trainer = make_trainer(shape, folder, options, rows, micro_batch=micro_batch, steps=steps, **settings)
        trainer.plan = Plan(lengths)
        clock = Clock(options.device)
        trainer.add_callback(clock)
        with contextlib.redirect_stdout(None):
            trainer.train()
        return [{"step": took} for took in clock.times[1:]]

    return run


def prompt_lengths(tokenizer: Any, rows: list[dict[str, Any]]) -> list[int]:
    """Tokens of each row's prompt."""
    return [len(tokenize_row(n, row, tokenizer, DataConfig()).prompt_ids) for n, row in enumerate(rows)]


def compare(shape: Shape, options: Namespace, limits: dict[str, Any]) -> dict[str, Any]:
    """One table: our two methods, TRL's defaults and its best settings."""
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(shape, Path(name) / "model")
        sides = {
            "uniapl, grpo": our_run(shape, folder, options),
            "uniapl, uniapl": our_run(shape, folder, options, **STEADY),
            **{f"uniapl, {part}": our_run(shape, folder, options, **steady) for part, steady in LESS.items()},
            "TRL, defaults": their_run(shape, folder, options, 8),
            "TRL, best": their_run(shape, folder, options, options.micro_batch, **BEST),
        }
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(options.repeats):
            for side, run in sides.items():
                found[side] += run()
        model, tokenizer = load(folder, "cpu")
    lengths = planned_lengths(shape, (options.steps + 1) * shape.rows)[shape.rows :]
    prompts = prompt_lengths(tokenizer, data_rows(shape, (options.steps + 1) * shape.prompts))[
        shape.prompts :
    ]
    update = update_work(model, prompts, lengths)
    rollout = rollout_work(model, prompts, lengths, bf16=options.bf16)
    work = (sum(pair) / options.steps for pair in zip(update, rollout, strict=True))
    parts = {
        side: {part: sum(r[part] for r in records) / len(records) for part in PARTS if part in records[0]}
        for side, records in found.items()
        if len(records[0]) > 1
    }
    return table(
        "whole step",
        # The embedded task's prompts have lengths of their own.
        replace(shape, prompt_length=round(sum(prompts) / len(prompts))),
        {side: [record["step"] for record in records] for side, records in found.items()},
        reference="uniapl, grpo",
        work=tuple(work),
        uncounted=[side for side in sides if side not in ("uniapl, grpo", "TRL, defaults", "TRL, best")],
        limits=limits,
        parts=parts,
    )


def main() -> None:
    """One table for each size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a run")
    parser.add_argument("--micro-batch", type=int, default=32, help="rows of TRL's micro-batch at its best")
    chosen_shapes(parser)
    options = parse(parser)
    limits = machine(options)
    tables = [compare(shape, options, limits) for shape in shapes(options)]
    for found in tables:
        for side, parts in found["parts"].items():
            print(f"{side}: " + ", ".join(f"{part} {took:.3f} s" for part, took in parts.items()))
    write("step", options, limits, tables)


if __name__ == "__main__":
    main()
