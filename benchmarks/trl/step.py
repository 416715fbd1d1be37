"""Time of a complete step (sampling, rewards, advantages, update) in `uniapl.train` and `GRPOTrainer.train`.

    python benchmarks/trl/step.py [--models 20m] [--steps 4] [--bf16] [--device cuda] [--json FILE]

Each repeat is a short run of every configuration in turn; the first step of a run is not counted. In addition
to GRPO, a step of the method `uniapl` is measured with its defaults, which adds demonstrations, discriminator
and KL.
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
    # The steady state of a long run: the cold start is over, and the KL reference is in use.
    "method": "uniapl",
    "batching": {"cold_start_steps": 0},
}
TRAINED = {"learning_rate": 1e-3, "warmup_steps": 0}
VARIANTS = {
    "no discriminator": STEADY | {"objective": {"lambda_adv": 0.0}},
    "head": STEADY | {"discriminator": {"kind": "head", **TRAINED}},
    "copy": STEADY | {"discriminator": {"kind": "bradley-terry", **TRAINED}},
    "grpo with the KL": {"method": "grpo", "objective": {"beta": 0.1}},
}
"""Variants of the method, which show what its parts cost."""
PARTS = ("rollout", "reward", "score", "update", "discriminator")


class Clock(TrainerCallback):
    """Measures the seconds of each of TRL's optimizer steps, including generation."""

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


class Enough(BaseException):
    """Ends a run without a checkpoint, which would take longer than the steps of a large model."""


class StoppingReward:
    """The random reward, for a given number of calls; the first is the trial before the run."""

    __name__ = "random_reward"

    def __init__(self, calls: int) -> None:
        self.calls_left = calls

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        if self.calls_left == 0:
            raise Enough
        self.calls_left -= 1
        return random_reward(completions, **columns)


Run = Callable[[], list[dict[str, float]]]
"""Does a short run and returns the times of each step but the first: "step", and its parts if available."""


def our_run(shape: Shape, folder: Path, options: Namespace, **changes: Any) -> Run:
    steps = options.steps + 1
    rows = data_rows(shape, steps * shape.prompts)
    directory = folder.parent / f"uniapl-{len(changes)}"
    values = merge(recipe(shape, folder, options), changes)
    values |= {
        "output_dir": str(directory),
        "overwrite": True,
        "max_steps": steps + 1,
        "save_steps": steps + 1,
    }
    values["logging_steps"] = steps
    # The rollouts of the step that is not finished have lengths too.
    lengths = planned_lengths(shape, (steps + 1) * shape.rows)

    def run() -> list[dict[str, float]]:
        reward = StoppingReward(calls=1 + steps)
        with (
            our_sampler_planned(Plan(lengths)),
            contextlib.redirect_stdout(None),
            contextlib.suppress(Enough),
        ):
            uniapl.train(values, train_dataset=rows, reward_functions=[reward])
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
    """Number of prompt tokens of each row."""
    return [len(tokenize_row(n, row, tokenizer, DataConfig()).prompt_ids) for n, row in enumerate(rows)]


def compare(shape: Shape, options: Namespace, limits: dict[str, Any]) -> dict[str, Any]:
    """Measure one table: UniAPL's two methods and variants, TRL's defaults and its best settings."""
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(shape, Path(name) / "model")
        sides = {
            "uniapl, grpo": our_run(shape, folder, options),
            "uniapl, uniapl": our_run(shape, folder, options, **STEADY),
            **{f"uniapl, {name}": our_run(shape, folder, options, **v) for name, v in VARIANTS.items()},
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
        "complete step",
        # The demo task's prompts do not have the length given by the shape.
        replace(shape, prompt_length=round(sum(prompts) / len(prompts))),
        {side: [record["step"] for record in records] for side, records in found.items()},
        reference="uniapl, grpo",
        work=tuple(work),
        uncounted=[side for side in sides if side not in ("uniapl, grpo", "TRL, defaults", "TRL, best")],
        limits=limits,
        parts=parts,
    )


def main() -> None:
    """Measure one table per model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=3, help="measured steps per run, after one that is not counted"
    )
    parser.add_argument(
        "--micro-batch", type=int, default=32, help="rows per micro-batch of TRL with its best settings"
    )
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
