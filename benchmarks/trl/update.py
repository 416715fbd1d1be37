"""Time of the policy update in UniAPL and TRL, after a check that losses and gradient norms agree.

python benchmarks/trl/update.py [--models 20m] [--prompt-length 512] [--bf16] [--device cuda]
"""

import argparse
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import interleaved, machine, seconds, table, update_work, write
from ours import our_update
from theirs import BEST, their_update
from work import Shape, chosen_shapes, make_work, parse, save_model, shapes

TOLERANCE = 1e-4
OURS = (4, 16)
"""Micro-batch sizes in rows that are tried for UniAPL; small ones need less padding."""
THEIRS = (8, 32)
"""Micro-batch sizes in rows that are tried for TRL; larger ones need fewer calls."""
Step = Callable[[], tuple[float, float]]


def tried(sides: dict[str, Step], options: Namespace) -> tuple[dict[str, float], float]:
    """Do two updates of every side; return the seconds of the second and the largest relative difference.

    Raises:
        SystemExit: Losses or gradient norms differ, so the work is not the same. Not raised for bf16.
    """
    values: dict[str, list[tuple[float, float]]] = {}
    times: dict[str, float] = {}
    for name, step in sides.items():
        values[name] = [step()]
        times[name] = seconds(lambda s=step, found=values[name]: found.append(s()), options.device)
        print(f"  tried {name}: {times[name]:.2f} s", flush=True)
    first = next(iter(values.values()))
    worst = max(
        abs(theirs - ours) / abs(ours)
        for pairs in values.values()
        for one, other in zip(first, pairs, strict=True)
        for ours, theirs in zip(one, other, strict=True)
    )
    print(f"  largest relative difference of losses and gradient norms: {worst:.1e}", flush=True)
    if worst > TOLERANCE and not options.bf16:
        raise SystemExit(f"losses or gradient norms of the sides differ by more than {TOLERANCE}: {values}")
    return times, worst


def compare(shape: Shape, options: Namespace, limits: dict[str, Any]) -> dict[str, Any]:
    """Measure one table: UniAPL and TRL, each with its defaults and its best settings."""
    work = make_work(shape)
    longest = shape.prompt_length + shape.completion_length
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(shape, Path(name) / "model")
        default, model = our_update(work, folder, options)
        defaults = {"uniapl, defaults": default, "TRL, defaults": their_update(work, folder, options)[0]}
        ours = {
            f"uniapl, micro-batches of {rows * longest:,} tokens": our_update(
                work, folder, options, max_tokens=rows * longest
            )[0]
            for rows in OURS
        }
        theirs = {
            f"TRL, micro-batches of {rows} rows, no gradient checkpointing": their_update(
                work, folder, options, micro_batch=rows, **BEST
            )[0]
            for rows in sorted({min(rows, shape.rows) for rows in THEIRS})
        }
        times, difference = tried(defaults | ours | theirs, options)
        best = [min(side, key=lambda name: times[name]) for side in (ours, theirs)]
        shown = defaults | {name: (ours | theirs)[name] for name in best}
        return table(
            f"update, prompts of {shape.prompt_length}",
            shape,
            interleaved(shown, options, warm_up=0),
            reference="uniapl, defaults",
            work=update_work(model, [*map(len, work.prompts)], work.lengths),
            limits=limits,
            difference=difference,
        )


def main() -> None:
    """Measure each model with prompts as long as the longest completion, and four times as long."""
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
