"""Run one cell in its own process: `python -m uniapl.compare.cell`, with the job as JSON on standard
input."""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from uniapl.compare.plan import BASE, Cell
from uniapl.compare.sampling import VALIDATION, Sample, Suites
from uniapl.config import Config
from uniapl.config.resolve import merge, resolve, stages_of
from uniapl.data.reading import read_rows
from uniapl.files import write_text
from uniapl.models.loading import ModelSource, load_model, put_on_device
from uniapl.training.api import train_resolved
from uniapl.training.build_teacher import teacher_source
from uniapl.training.given import Given
from uniapl.training.state_adversary import STATE_KINDS

CURVE = (
    "reward",
    "trained/entropy",
    "rollout/entropy_estimate",
    "discriminator/win_rate",
    "adversary/active",
    "adversary/reward_change",
    "adversary/advantage_change",
)
"""Metrics of the training step that a point of a curve keeps."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A cell, and what is the same for all cells of a comparison."""

    cell: Cell
    cut: Mapping[str, Sequence[int]]
    """Suite -> numbers of the training rows that form it."""
    base: Mapping[str, Any]
    """The recipe of the model before training, with the trackers of all runs."""
    eval_steps: int
    """Steps between the points of the curve; 0 has no curve."""
    work: str
    """Directory for the run, which is deleted when the cell is finished."""
    result: str
    """The file to write."""
    model: str | None = None
    """The directory to move the trained model to; null deletes it."""

    def to_json(self) -> str:
        """The job as text."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Job":
        """The inverse of :meth:`to_json`."""
        values = json.loads(text)
        return Job(**{**values, "cell": Cell(**values["cell"])})


def run_cell(job: Job) -> dict[str, Any]:
    """Train and sample; returns the cell, its final sample, its curve and its costs, as values for JSON."""
    started = time.monotonic()
    cell = job.cell
    config = resolve(dict(cell.recipe or job.base)).config
    suites = Suites.load(config, job.cut, search=cell.search)
    outcome: dict[str, Any] = {"cell": asdict(cell), "curve": [], "cost": dict.fromkeys(COSTS, 0)}
    outcome["warnings"] = {}
    source = suites.source
    Path(job.work).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.work) as work:
        if cell.method != BASE:
            final, points = _train(job, config, suites, Path(work))
            run = Path(work) / "run"
            stages = [stage.config for stage in stages_of(resolve(dict(cell.recipe)))]
            teachers = [_teacher_parameters(stage) for stage in stages]
            records = _lines(run / "metrics.jsonl")
            outcome |= costs(records, stages, _parameters(suites.source), points, teachers)
            outcome["warnings"] = first_warnings(_lines(run / "health.jsonl"))
            if job.model:
                # A cell that was killed before it wrote its outcome may have left a model.
                shutil.rmtree(job.model, ignore_errors=True)
                Path(job.model).parent.mkdir(exist_ok=True)
                final = Path(shutil.move(final, job.model))
            source = source.with_weights(final)
        model = _loaded(source)
    sample, results = suites.sample(model, cell.seed)
    suites.add_likelihoods(sample, results, model, _loaded(suites.source) if cell.method != BASE else model)
    return {**outcome, "final": sample, "wall": time.monotonic() - started}


def _train(job: Job, config: Config, suites: Suites, work: Path) -> tuple[Path, dict[int, Sample]]:
    """The trained model, and step -> the sample of each point of the curve."""
    points: dict[int, Sample] = {}

    def evaluate(step: int, model: PreTrainedModel) -> Mapping[str, Any]:
        if not job.eval_steps or step % job.eval_steps:
            return {}
        points[step], results = suites.sample(model, job.cell.seed)
        return {f"{suite}/{name}": value for suite, r in results.items() for name, value in r.metrics.items()}

    changes = {
        "output_dir": str(work / "run"),
        "save_steps": 10**9,
        "eval_steps": 0,
        "log_completions_steps": 0,
        **tracking(job),
    }
    cut = [numbers for name, numbers in job.cut.items() if job.cell.search or name != VALIDATION]
    out = {number for numbers in cut for number in numbers}
    rows = [row for number, row in read_rows(config.data) if number not in out] if out else None
    recipe = resolve(merge(dict(job.cell.recipe), changes))
    result = train_resolved(recipe, Given(train_dataset=rows, evaluate=evaluate))
    return result.final_dir, points


def tracking(job: Job) -> dict[str, Any]:
    """The keys of the recipe that track the run, in the group of its comparison.

    TensorBoard's files would be in the directory of the run, which is deleted.
    """
    trackers = resolve(dict(job.base)).config.report_to
    return {
        "report_to": [name for name in trackers if name != "tensorboard"],
        "run_name": job.cell.name,
        "run_group": job.base.get("run_group") or Path(job.result).absolute().parents[1].name,
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def first_warnings(log: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Health rule -> the first step in which it fired; `log` has the lines of health.jsonl, in order."""
    found: dict[str, int] = {}
    for line in log:
        found.setdefault(line["rule"], line["step"])
    return found


SAMPLING = 2
"""FLOPs per parameter for sampling one token."""
COSTS = ("rollout_tokens", "trained_tokens", "flops", "seconds")


def costs(
    records: Sequence[Mapping[str, Any]],
    stages: Sequence[Config],
    parameters: int,
    points: Mapping[int, Sample],
    teachers: Sequence[int] = (),
) -> dict[str, Any]:
    """The costs of a complete run and of each point of its curve, without the measurements.

    FLOPs are 2 per parameter and token for a forward pass and 6 for a training step (arXiv 2001.08361), over
    completion tokens: prompts are not counted. See :func:`flops_per_token`. The reference also reads the
    completions of preference pairs. Rollouts that were replaced are only sampled.

    Args:
        parameters: Of the policy.
        teachers: Parameters of each stage's local teacher, 0 without one. A served teacher is not counted.
    """
    cost: dict[str, float] = dict.fromkeys(COSTS, 0)
    curve: list[dict[str, Any]] = []
    for record in records:
        rollout, sft = record["tokens/rollout"], record["tokens/sft"]
        discarded = record.get("tokens/discarded", 0)
        trained, stage = rollout - discarded, record.get("stage") or 0
        cost["rollout_tokens"] += rollout
        # Older runs have no pairs.
        pairs = record.get("tokens/pref", 0)
        cost["trained_tokens"] += trained + sft + pairs
        cost["flops"] += parameters * (
            trained * flops_per_token(stages[stage]) + SAMPLING * discarded + 6 * sft + 8 * pairs
        )
        cost["flops"] += 2 * trained * (teachers[stage] if teachers else 0)
        cost["seconds"] += record["step_time"]
        if sample := points.get(record["step"]):
            kept = {name: record[name] for name in CURVE if record.get(name) is not None}
            curve.append({"step": record["step"], **cost, "sample": sample, "metrics": kept})
    return {"cost": cost, "curve": curve}


def flops_per_token(config: Config) -> int:
    """FLOPs per parameter of the policy for one token of a rollout: sampled, trained on, and scored.

    Sampling is a forward pass (2) and the update a training step (6). The KL reference adds a forward pass,
    which discriminators on its states share. A co-trained discriminator adds a forward pass and its updates,
    and a frozen one a forward pass, as if it had the size of the policy.
    """
    objective, discriminator = config.objective, config.discriminator
    adversary = objective.lambda_adv > 0
    on_reference = adversary and discriminator.kind in STATE_KINDS
    flops = SAMPLING + 6
    if objective.beta > 0 or objective.pairs_rollouts or on_reference:
        flops += 2
    if adversary and not on_reference:
        flops += 2
    if adversary and discriminator.kind == "bradley-terry":
        flops += 6 * discriminator.updates_per_step
    return flops


def _teacher_parameters(config: Config) -> int:
    if not config.objective.teacher_kl or config.teacher.url is not None:
        return 0
    return _parameters(teacher_source(config.teacher))


def _parameters(source: ModelSource) -> int:
    return load_model(source).num_parameters()


def _loaded(source: ModelSource) -> PreTrainedModel:
    model = load_model(source)
    put_on_device(model)
    return model


def _end_with_parent(parent: int) -> None:
    """End this process when the comparison that started it is killed: it would only use the processor."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Run the job on standard input and write its outcome."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    job = Job.from_json(sys.stdin.read())
    outcome = run_cell(job)
    write_text(Path(job.result), json.dumps(outcome))
    shutil.rmtree(job.work, ignore_errors=True)


if __name__ == "__main__":
    main()
