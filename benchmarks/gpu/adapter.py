"""Three steps of uniapl with LoRA at the size of Qwen3-4B."""

import json
import tempfile
import time
from pathlib import Path

import torch
from resume import recipe
from stage import Report, parse, peak_memory, sized
from work import Shape, data_rows, random_reward, save_model

import uniapl
from uniapl.config.resolve import merge

SHAPE = Shape(
    model="qwen3-4b",
    prompts=4,
    generations=8,
    prompt_length=256,
    completion_length=256,
    vocabulary=151_936,
)
STEPS = 3
ADAPTERS = {
    "model": {"lora_r": 16},
    "optim": {"gradient_checkpointing": True},
    "batching": {"max_tokens_per_micro_batch": 4096},
}
"""As in recipes/qwen3-4b-lora.yaml."""


def main() -> None:
    """Train three steps; report their times and the peak memory."""
    options = parse()
    report = Report("adapter", options)
    shape = sized(SHAPE, options)
    with tempfile.TemporaryDirectory() as name:
        # bf16 halves the file; the weights are loaded in fp32 as always.
        folder = save_model(shape, Path(name) / "model", device=options.device, dtype=torch.bfloat16)
        values = merge(recipe(shape, folder, Path(name) / "run", steps=STEPS, bf16=True), ADAPTERS)
        start = time.perf_counter()
        with peak_memory(options) as memory:
            result = uniapl.train(
                values,
                train_dataset=data_rows(shape, 4 * shape.prompts),
                reward_functions=[random_reward],
                quiet=True,
            )
        report.set(seconds=time.perf_counter() - start, **memory)
        records = [
            json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()
        ]
        for record in records:
            parts = {key: value for key, value in record.items() if key.startswith("time/")}
            report.row(
                f"step {record['step']}", seconds=record["step_time"], grad_norm=record["grad_norm"], **parts
            )
        skipped = float(sum(record["skipped"] for record in records))
        report.check("steps skipped because of non-finite numbers", skipped, 0)
    report.finish()


if __name__ == "__main__":
    main()
