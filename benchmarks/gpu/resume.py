"""20 steps of uniapl, interrupted and resumed in the middle, compared with an uninterrupted run."""

import json
import signal
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from stage import Report, parse, sized
from work import Shape, data_rows, random_reward, save_model

import uniapl
from uniapl.errors import Interrupted

SHAPE = Shape(prompts=4, generations=8, prompt_length=64, completion_length=64)


def recipe(shape: Shape, folder: Path, output: Path, *, steps: int, bf16: bool) -> dict[str, Any]:
    """Every component acts from the first steps on."""
    return {
        "method": "uniapl",
        "output_dir": str(output),
        "max_steps": steps,
        "save_steps": steps,
        "logging_steps": steps,
        "log_completions_steps": 0,
        "model": {"model_name_or_path": str(folder)},
        "rollout": {
            "num_generations": shape.generations,
            "max_completion_length": shape.completion_length,
        },
        "objective": {"reference_step": 2},
        "discriminator": {"warmup_steps": 1, "min_accuracy": 0.0},
        "optim": {"learning_rate": 1e-4, "bf16": bf16},
        "batching": {"prompts_per_step": shape.prompts, "demonstrations_per_step": shape.prompts},
        "rewards": {"timeout": None},
    }


class InterruptingReward:
    """The random reward, which interrupts the run in the middle as Ctrl-C does."""

    __name__ = "random_reward"

    def __init__(self, call: int) -> None:
        self.calls_left = call

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        self.calls_left -= 1
        if self.calls_left == 0:
            signal.raise_signal(signal.SIGINT)
        return random_reward(completions, **columns)


def resumed_difference(report: Report, options: Namespace, *, steps: int, bf16: bool) -> None:
    """Check that the weights of a resumed run equal those of an uninterrupted one.

    On a CPU in fp32 they are equal bit for bit; a GPU's kernels may sum in another order from run to run, so
    the difference between two uninterrupted runs is measured as well.
    """
    shape = sized(SHAPE, options)
    rows = data_rows(shape, 4 * shape.prompts)
    weights: list[dict[str, torch.Tensor]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(shape, Path(name) / "model")
        for run in ("whole", "again", "resumed"):
            values = recipe(shape, folder, Path(name) / run, steps=steps, bf16=bf16)
            if run == "resumed":
                # The first call is the trial before the run.
                interrupting = InterruptingReward(1 + steps // 2)
                try:
                    uniapl.train(values, train_dataset=rows, reward_functions=[interrupting], quiet=True)
                except Interrupted as error:
                    print(f"       {error}", flush=True)
                values["resume"] = "auto"
            result = uniapl.train(values, train_dataset=rows, reward_functions=[random_reward], quiet=True)
            weights.append(load_file(result.final_dir / "model.safetensors"))
            records = (result.output_dir / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in records] == [*range(1, steps + 1)], run
    whole, again, resumed = weights
    noise, difference = (
        max(float((whole[key] - other[key]).abs().max()) for key in whole) for other in (again, resumed)
    )
    words = f"{steps} steps of uniapl, {'bf16' if bf16 else 'fp32'}"
    report.row(f"weights of two uninterrupted runs, {words}", largest_difference=noise)
    report.check(
        f"weights of the resumed and the whole run, {words}",
        difference,
        0.0 if options.device == "cpu" else max(2 * noise, 1e-6),
    )


def main() -> None:
    """Run 20 steps."""
    options = parse()
    report = Report("resume", options)
    resumed_difference(report, options, steps=20 if not options.tiny else 6, bf16=options.device == "cuda")
    report.finish()


if __name__ == "__main__":
    main()
