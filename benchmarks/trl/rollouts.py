"""Rollout time: UniAPL's sampler and TRL's sampling modes, with the same planned completion lengths.

python benchmarks/trl/rollouts.py [--models 20m] [--generations 16] [--bf16] [--device cuda] [--json FILE]
"""

import argparse
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import interleaved, machine, rollout_work, table, write
from ours import our_stage
from planned import Plan, our_sampler_planned
from theirs import their_sampler
from work import Shape, Work, chosen_shapes, make_work, parse, save_model, shapes

from uniapl.rollout import SampleRequest

# TRL's sampling modes without vLLM, and the settings that select them.
WAYS: dict[str, dict[str, Any]] = {
    "generate": {},
    "static": {"cache_implementation": "static"},
    "continuous": {"use_transformers_continuous_batching": True},
}


def our_sampler(work: Work, folder: Path, options: Namespace) -> tuple[Callable[[], list[list[int]]], Any]:
    """Return a function that samples the given work with a stage's sampler, and the model."""
    _, stage, _ = our_stage(work, folder, options)

    def sample() -> list[list[int]]:
        with our_sampler_planned(Plan(work.lengths)):
            groups = stage.sampler.sample(
                SampleRequest(
                    prompts=[tuple(prompt) for prompt in work.prompts],
                    seeds=list(range(len(work.prompts))),
                    num_generations=work.shape.generations,
                )
            )
        return [list(rollout.completion_ids) for group in groups for rollout in group]

    return sample, stage.model


def compare(shape: Shape, options: Namespace, limits: dict[str, Any]) -> dict[str, Any]:
    """Measure one table: UniAPL and each of TRL's sampling modes.

    Raises:
        SystemExit: A side sampled completions of other lengths than planned.
    """
    work = make_work(shape)
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(shape, Path(name) / "model")
        ours, model = our_sampler(work, folder, options)
        sides = {"uniapl": ours}
        sides |= {f"TRL, {way}": their_sampler(work, folder, options, **WAYS[way])[0] for way in options.ways}
        for side, sample in sides.items():
            sampled = sorted(map(len, sample()))
            if sampled != sorted(work.lengths):
                raise SystemExit(
                    f"{side}: completion lengths {sampled} differ from the planned {sorted(work.lengths)}"
                )
        floor = rollout_work(model, [*map(len, work.prompts)], work.lengths, bf16=options.bf16)
        return table(
            f"rollouts, G = {shape.generations}",
            shape,
            interleaved(sides, options),
            reference="uniapl",
            work=floor,
            limits=limits,
            tokens=sum(work.lengths),
        )


def main() -> None:
    """Measure one table per model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=[*WAYS])
    chosen_shapes(parser)
    options = parse(parser)
    limits = machine(options)
    tables = [compare(shape, options, limits) for shape in shapes(options)]
    write("rollouts", options, limits, tables)


if __name__ == "__main__":
    main()
