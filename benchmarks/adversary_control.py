"""The adversary on the demo task: under a constraint, frozen, and compared with the other loss components.

    python benchmarks/adversary_control.py [--output docs/adversary] [--seed 0] [--only fixed-8,gap-0.1]

Every run writes its metrics to OUTPUT/NAME.jsonl; runs whose file exists are not repeated. At the end the
script prints a table and draws one figure per question: does a learned lambda hold the gap where a fixed one
needs tuning, does the policy exploit a frozen discriminator and which metrics show it, and do the gradients
of the three loss components point in the same direction.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

STEPS = 100

# A constant learning rate, so that the policy can still react to the adversary at the end of a run.
STEADY = {"learning_rate": 2.5e-4, "lr_scheduler_type": "constant"}
UNGATED = {"kind": "bradley-terry", "learning_rate": 1e-3, "min_accuracy": 0.0}
WATCHED = {"method": "a-grpo", "max_steps": 150, "discriminator": UNGATED, "optim": STEADY}
"""For the constraint: half of the prompts have a demonstration, so that each win rate covers 48 pairs."""


def dual(gap: float) -> dict[str, Any]:
    """Learn lambda by dual ascent so that the expert gap stays below `gap`."""
    learned = {"lambda_controller": "dual", "max_expert_gap": gap, "lambda_learning_rate": 0.5}
    return {**WATCHED, "objective": learned}


def fixed(value: float) -> dict[str, Any]:
    """Use a fixed lambda."""
    return {**WATCHED, "objective": {"lambda_adv": value}}


RUNS: dict[str, dict[str, Any]] = {
    "fixed-0.5": fixed(0.5),
    "fixed-8": fixed(8.0),
    "gap-0.1": dual(0.1),
    "gap-0.2": dual(0.2),
    "long-frozen": {
        "method": "a-grpo",
        "max_steps": 3 * STEPS,
        "objective": {"lambda_adv": 4.0},
        "discriminator": {"freeze_after_steps": 20, "updates_per_step": 10, **UNGATED},
        "optim": STEADY,
    },
    "forces": {"method": "uniapl", "log_gradients_steps": 2, "discriminator": UNGATED},
}
KEPT = ("step", "reward", "discriminator/", "weight/", "constraint/", "eval/", "grad_", "health/")
"""Prefixes of the metrics that are saved; `completions/length_ratio` is saved too."""


def run(name: str, output: Path, seed: int) -> None:
    """Train, and save the metrics of every step."""
    from transformers import AutoTokenizer, PreTrainedModel

    from uniapl.config.resolve import merge, resolve
    from uniapl.demo.measure import measure
    from uniapl.demo.recipe import RECIPE
    from uniapl.demo.task import make_task
    from uniapl.training.api import train_resolved
    from uniapl.training.given import Given

    task = make_task(seed=seed, demonstrations=512 if name in FIGURES["constraint"][0] else 256)
    held_out = dict(list(task.held_out.items())[:128])
    with as_file(files("uniapl.demo") / "base") as base, tempfile.TemporaryDirectory() as work:
        tokenizer = AutoTokenizer.from_pretrained(base)

        def evaluate(step: int, model: PreTrainedModel) -> Mapping[str, Any]:
            if step % 10:
                return {}
            found, _ = measure(model, tokenizer, held_out)
            return {key: getattr(found, key) for key in ("good", "passed", "fluency", "expert_nll")}

        changes = {
            "seed": seed,
            "output_dir": f"{work}/run",
            "max_steps": STEPS,
            "save_steps": 10**6,
            "model": {"model_name_or_path": str(base)},
        }
        recipe = merge(merge(RECIPE, changes), RUNS[name])
        result = train_resolved(resolve(recipe), Given(train_dataset=task.rows, evaluate=evaluate))
        lines = (result.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    temporary = output / f"{name}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        for record in map(json.loads, lines):
            kept = {k: v for k, v in record.items() if k.startswith(KEPT) or k == "completions/length_ratio"}
            file.write(json.dumps(kept) + "\n")
    temporary.rename(output / f"{name}.jsonl")


def row(records: list[dict[str, Any]]) -> dict[str, float | None]:
    """Table row of a run: means over its last third."""
    last = records[-len(records) // 3 :]

    def mean(key: str, part: list[dict[str, Any]] = last) -> float | None:
        values = [record[key] for record in part if record.get(key) is not None]
        return statistics.fmean(values) if values else None

    win_rate = mean("discriminator/pair_win_rate")
    warnings = [record["step"] for record in records if record.get("health/divergence")]
    return {
        "gap": None if win_rate is None else 0.5 - win_rate,
        "lambda": mean("weight/lambda_adv"),
        "reward": mean("reward"),
        "good": mean("eval/good"),
        "fluency": mean("eval/fluency"),
        "expert nll": mean("eval/expert_nll"),
        "length ratio": mean("completions/length_ratio"),
        "first divergence warning": float(warnings[0]) if warnings else None,
        "cos sft rl": mean("grad_cosine/sft_rl"),
        "cos sft adv": mean("grad_cosine/sft_adv"),
        "cos rl adv": mean("grad_cosine/rl_adv"),
    }


FIGURES = {
    "constraint": (
        ("fixed-0.5", "fixed-8", "gap-0.1", "gap-0.2"),
        ("discriminator/pair_win_rate", "weight/lambda_adv", "eval/good"),
    ),
    "frozen": (
        ("long-frozen",),
        ("discriminator/win_rate", "reward", "eval/fluency", "eval/expert_nll"),
    ),
    "forces": (
        ("forces",),
        ("grad_cosine/sft_rl", "grad_cosine/sft_adv", "grad_cosine/rl_adv", "grad_norm/adv"),
    ),
}


def draw(name: str, runs: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """One panel per metric, one line per run, smoothed over about ten steps."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    shown, keys = FIGURES[name]
    figure, panels = pyplot.subplots(1, len(keys), figsize=(4 * len(keys), 3.2), layout="constrained")
    for key, panel in zip(keys, panels, strict=True):
        for label in shown:
            points = [(r["step"], r[key]) for r in runs.get(label, []) if r.get(key) is not None]
            smooth: list[float] = []
            for _, value in points:
                smooth.append(value if not smooth else smooth[-1] + 0.2 * (value - smooth[-1]))
            panel.plot([step for step, _ in points], smooth, label=label)
        panel.set(title=key, xlabel="step")
    panels[0].legend(fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Run what is missing, print the table and draw the figures."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--output", type=Path, default=Path("docs/adversary"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(RUNS))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(","):
        if not (options.output / f"{name}.jsonl").exists():
            run(name, options.output, options.seed)
    runs = {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(options.output.glob("*.jsonl"))
    }
    rows = {name: row(records) for name, records in runs.items()}
    columns = list(next(iter(rows.values())))
    print(f"| run | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, values in rows.items():
        cells = ["" if values[column] is None else f"{values[column]:.3f}" for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    for name in FIGURES:
        draw(name, runs, options.output / f"{name}.svg")


if __name__ == "__main__":
    main()
