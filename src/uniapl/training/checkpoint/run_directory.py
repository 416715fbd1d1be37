"""The run directory: its files, and what config.yaml and manifest.json hold."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from uniapl.config import Config
from uniapl.config.resolve import STAGE_KEYS, Resolved, flatten, load_recipe, validate
from uniapl.data.rows import is_plain_text
from uniapl.errors import UsageError
from uniapl.files import write_text
from uniapl.report.reading import BEST, END_STATE, MEASUREMENTS, MODEL_ANALYSIS
from uniapl.training.checkpoint import directory as checkpoint_directory
from uniapl.training.inputs import RunInputs

END_FILES = (END_STATE, MODEL_ANALYSIS, MEASUREMENTS, "report.html")
"""Files that only a run that has ended has."""
LOGS = ("metrics.jsonl", "completions.jsonl", "health.jsonl")
RUN_FILES = ("config.yaml", "manifest.json", BEST, *LOGS, *END_FILES)
WEIGHTS_IN_TRANSIT = "weights-for-vllm"
"""Directory that exists only while vLLM loads weights from it."""

RUN_DIRECTORIES = ("checkpoints", "stages", "final", "skipped", WEIGHTS_IN_TRANSIT)


def check_run_directory(config: Config, run_dir: Path, resumed_from: Path | None) -> None:
    """Refuse to mix two runs in one directory.

    Raises:
        UsageError: The directory holds a run, and neither `resume` nor `overwrite` is set for it.
    """
    occupied = [name for name in (*RUN_FILES, *RUN_DIRECTORIES) if os.path.exists(run_dir / name)]
    listed = ", ".join(occupied)
    if occupied and config.resume == "never" and not config.overwrite:
        raise UsageError(
            f"output_dir '{run_dir}' already holds a run ({listed}): continue it with --resume auto, "
            "replace it with --overwrite, or choose another --output-dir"
        )
    # The directory with the checkpoints may be a link to another disk.
    own = {run_dir.resolve(), (run_dir / "checkpoints").resolve()}
    if occupied and resumed_from and own.isdisjoint(resumed_from.resolve().parents):
        raise UsageError(
            f"output_dir '{run_dir}' already holds another run ({listed}), which the checkpoint "
            f"'{resumed_from}' does not belong to: choose another --output-dir"
        )


def changed_values(resolved: Resolved, stages: Sequence[Resolved], run_dir: Path) -> list[str]:
    """How the recipe differs from the one with which the run in `run_dir` was last started."""
    file = run_dir / "config.yaml"
    if not os.path.exists(file):
        return []
    before, now = flatten(load_recipe(file)), flatten(yaml.safe_load(_as_recipe(resolved, stages)))
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return [f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys]


def recorded_config(config: Config, run_dir: Path) -> Config:
    """The configuration in config.yaml, with which a finished run was trained.

    It is `config` itself if there is no such file, or if it is of another version.
    """
    try:
        recorded = validate(Config, load_recipe(run_dir / "config.yaml"))
    except UsageError:
        return config
    return recorded.model_copy(update={"output_dir": config.output_dir})


def prepare_run_directory(
    resolved: Resolved, stages: Sequence[Resolved], inputs: RunInputs, run_dir: Path
) -> None:
    """Create the directory, delete a run that is replaced, and write config.yaml and manifest.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if resolved.config.resume == "never":
        # Checkpoints first: if the run is killed here, it must not resume from the run that it replaces.
        for path in (run_dir / name for name in (*RUN_DIRECTORIES, *RUN_FILES)):
            if path.is_dir():
                checkpoint_directory.remove(path)
            else:
                path.unlink(missing_ok=True)
    for name in END_FILES:
        (run_dir / name).unlink(missing_ok=True)
    write_text(run_dir / "config.yaml", _as_recipe(resolved, stages))
    write_text(run_dir / "manifest.json", json.dumps(run_manifest(resolved, inputs), indent=1))


def _as_recipe(resolved: Resolved, stages: Sequence[Resolved]) -> str:
    """A recipe that reproduces the run, with all values of every stage."""
    values = resolved.config.model_dump(mode="json", exclude={"resume", "overwrite"})
    values["num_train_epochs"] = None  # max_steps has the number of steps
    if resolved.config.stages:
        values["stages"] = [
            {key: value for key, value in stage.config.model_dump(mode="json").items() if key in STAGE_KEYS}
            | {"num_train_epochs": None}
            for stage in stages
        ]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def run_manifest(resolved: Resolved, inputs: RunInputs) -> dict[str, Any]:
    """What reproduces the run, and the source of every value that is not a default."""
    config = resolved.config
    packages = ("uniapl", "torch", "transformers", "accelerate")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "seed": config.seed,
        "model": config.model.model_name_or_path,
        "data": {
            "path": config.data.path,
            "sha256": inputs.data_sha256,
            "examples": len(inputs.dataset.examples),
            "plain_text_prompts": sum(is_plain_text(e.prompt, config.data) for e in inputs.dataset.examples),
            "left_out": {reason: len(rows) for reason, rows in inputs.dataset.left_out.items()},
        },
        "git_commit": _git_commit(),
        "sources": {key: source for key, source in resolved.sources.items() if source != "default"},
    }


def _git_commit() -> str | None:
    """The commit of the working directory; None outside a repository or without git."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None
