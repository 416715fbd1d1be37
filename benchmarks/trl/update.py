"""The update of the policy: ours beside TRL's, with losses and gradient norms compared before any is timed.

python benchmarks/trl/update.py [--models 20m] [--prompt-length 512] [--bf16] [--device cuda]
"""

import argparse
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import fastest, interleaved, machine, table, update_work, write
from ours import our_update
from theirs import BEST, their_update
from work import Shape, chosen_shapes, make_work, parse, save_model, shapes

TOLERANCE = 1e-4
Step = Callable[[], tuple[float, float]]


def agreement(sides: dict[str, Step]) -> dict[str, Any]:
    """Losses and gradient norms of the first two updates of every side.

    Raises:
        SystemExit: They differ: the sides do not do the same work. Under bf16 nothing is refused.
    """
    found = {name: [step(), step()] for name, step in sides.items()}
    first = next(iter(found.values()))
    worst = max(
        abs(theirs - ours) / abs(ours)
        for pairs in found.values()
        for one, other in zip(first, pairs, strict=True)
        for ours, theirs in zip(one, other, strict=True)
    )
    return {"values": found, "largest_relative_difference": worst}


def compare(shape: Shape, options: Namespace, limits: dict[str, Any]) -> dict[str, Any]:
    """One table: our default and best settings, and TRL's."""
    work = make_work(shape)
    longest = shape.prompt_length + shape.completion_length
    sizes = [size for size in (4, 8, 16, 32) if size <= shape.rows and shape.rows % size == 0]
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(shape, Path(name) / "model")
        ours = {str(rows): our_update(work, folder, options, max_tokens=rows * longest)[0] for rows in sizes}
        theirs = {
            str(rows): their_update(work, folder, options, micro_batch=rows, **BEST)[0] for rows in sizes
        }
        default, model = our_update(work, folder, options)
        sides = {"uniapl, defaults": default, "TRL, defaults": their_update(work, folder, options)[0]}
        everyone = (
            sides | {f"uniapl {k}": v for k, v in ours.items()} | {f"TRL {k}": v for k, v in theirs.items()}
        )
        same = agreement(everyone)
        print(f"largest relative difference {same['largest_relative_difference']:.1e}", flush=True)
        if same["largest_relative_difference"] > TOLERANCE and not options.bf16:
            raise SystemExit(f"the sides do not do the same: {same['values']}")
        best, their_best = fastest(ours, options), fastest(theirs, options)
        sides[f"uniapl, {best} rows of tokens"] = ours[best]
        sides[f"TRL, {their_best} rows, nothing recomputed"] = theirs[their_best]
        return table(
            f"update, prompts of {shape.prompt_length}",
            shape,
            interleaved(sides, options),
            reference="uniapl, defaults",
            work=update_work(model, [*map(len, work.prompts)], work.lengths),
            limits=limits,
            difference=same["largest_relative_difference"],
        )


def main() -> None:
    """Each size with prompts as long as the longest answer, and four times as long."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    chosen_shapes(parser)
    options = parse(parser)
    limits = machine(options)
    tables = [
        compare(replace(shape, prompt_length=times * shape.completion_length), options, limits)
        if options.prompt_length is None
        else compare(shape, options, limits)
        for shape in shapes(options)
        for times in ((1, 4) if options.prompt_length is None else (1,))
    ]
    write("update", options, limits, tables)


if __name__ == "__main__":
    main()
