"""Checkpoints: written atomically, verified when read, and free of pickles.

A checkpoint is a directory that `transformers` can load, plus what an exact resume needs. It is written under
a temporary name, with a manifest (size and SHA-256 of every file) as its last file, and then renamed.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from uniapl.errors import UsageError
from uniapl.files import TEMPORARY_PREFIX, sync, sync_tree
from uniapl.report.reading import BEST
from uniapl.training.distributed.fsdp import like

MANIFEST = "manifest.json"
STATE = "state.json"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write files into a new directory, add a manifest, and rename the directory to `path`.

    If anything fails, `path` is complete or as it was before. While it is replaced it is missing between two
    renames. If it already holds the same contents, it is left alone.

    Raises:
        OSError: The disk is full, read-only or broken; the error names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        fill(temporary)
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        manifest: dict[str, Any] = {}
        for file in files:
            _read_back(file)
            name = str(file.relative_to(temporary))
            manifest[name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync_tree(temporary)
        if _read_manifest(path) == manifest and not defects(path):
            shutil.rmtree(temporary)
            return
        aside = _set_aside(path) if path.exists() else None
        temporary.rename(path)
        # The parent itself may be new.
        for folder in (path.parent, path.parent.parent):
            sync(folder)
        if aside is not None:
            _delete(aside)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (number := _error_number(error)) is not None:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _error_number(error: BaseException) -> int | None:
    """The operating system's error number; safetensors and tokenizers wrap it in errors of their own."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def remove(path: Path) -> None:
    """Delete a directory. It is renamed first, so that no half of it is ever found under its name.

    If it is a symbolic link to a directory, the contents of that directory are deleted and the link is kept.
    """
    if path.is_symlink():
        for child in path.iterdir():
            remove(child) if child.is_dir() and not child.is_symlink() else child.unlink()
        return
    aside = _set_aside(path)
    sync(path.parent)
    _delete(aside)


def _set_aside(path: Path) -> Path:
    aside = path.parent / f"{TEMPORARY_PREFIX}removed-{path.name}"
    with contextlib.suppress(OSError):
        _delete(aside)
    return path.rename(aside)


def _delete(path: Path) -> None:
    """Delete a directory or a file, if it exists; of a symbolic link, the link only."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sweep(run_dir: Path) -> None:
    """Delete what a killed save, write or deletion left."""
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "stages", run_dir / "skipped"):
        for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
            with contextlib.suppress(OSError):
                _delete(path)


def defects(path: Path) -> list[str]:
    """What is wrong with a directory that has a manifest, one line per file; empty if it is complete."""
    manifest = _read_manifest(path)
    if isinstance(manifest, Exception):
        return [f"{MANIFEST}: {manifest}"]
    entries = manifest.values() if isinstance(manifest, dict) else ()
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        return [f"{MANIFEST}: not a mapping of files to sizes and checksums"]
    found: list[str] = []
    for name, expected in manifest.items():
        try:
            defect = _defect(path, name, expected)
        except OSError as error:
            defect = str(error)
        if defect is not None:
            found.append(f"{name:.80}: {defect}")
    return found


def listed_files(path: Path) -> list[str]:
    """The names of the files in a directory's manifest; [] if there is none that can be read."""
    manifest = _read_manifest(path)
    return sorted(manifest) if isinstance(manifest, dict) else []


def _read_manifest(path: Path) -> Any:
    """The contents of a directory's manifest, or the error of reading it."""
    try:
        return json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return error


def _defect(directory: Path, name: str, expected: dict[str, Any]) -> str | None:
    file = directory / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "not inside the directory"
    if not os.path.isfile(file):
        return "missing"
    if file.stat().st_size != expected.get("bytes"):
        return f"{file.stat().st_size} bytes, expected {expected.get('bytes')!r:.80}"
    return None if _sha256(file) == expected.get("sha256") else "contents changed"


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, including damaged ones; other names are ignored."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((path for path in found if path.name.removeprefix("step-").isdecimal()), key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint's directory is named after."""
    return int(path.name.removeprefix("step-"))


def find_checkpoint(run_dir: Path, resume: str, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from: the newest complete one for "auto", None for "never", or the path given.

    Raises:
        UsageError: The given checkpoint is missing or damaged, or all checkpoints of the run are damaged.
    """
    if resume == "never":
        return None
    if resume != "auto":
        path = Path(resume)
        # os.path.isdir also accepts names that are too long for a file, unlike Path.is_dir.
        if not os.path.isdir(path):
            raise UsageError(
                f"resume: '{path}' is not a directory; give a checkpoint's directory, or auto for the newest "
                "checkpoint in output_dir"
            )
        if existing := checkpoints(path):
            raise UsageError(
                f"resume: '{path}' is a run directory; give auto if it is the output_dir, or a checkpoint "
                f"such as {existing[-1]}"
            )
        if found := defects(path):
            raise UsageError(f"checkpoint '{path}' cannot be used: {'; '.join(found)}")
        if not (path / STATE).is_file():
            raise UsageError(f"'{path}' is a model, not a checkpoint: set model.model_name_or_path to it")
        return path
    existing = checkpoints(run_dir)
    for path in reversed(existing):
        found = defects(path)
        if not found and (path / STATE).is_file():
            return path
        say(f"checkpoint {path} is damaged and skipped: {'; '.join(found or [f'{STATE}: missing'])}")
    if existing:
        folder = run_dir / "checkpoints"
        raise UsageError(f"every checkpoint in {folder} is damaged: choose another --output-dir")
    return None


def forget_after(run_dir: Path, step: int) -> None:
    """Delete the checkpoints of later steps, which a run that resumes from `step` will write again."""
    for path in checkpoints(run_dir):
        if step_of(path) > step:
            remove(path)


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    best = best_step(run_dir)
    for path in checkpoints(run_dir)[:-keep]:
        if step_of(path) != best:
            remove(path)


def best_step(run_dir: Path) -> int | None:
    """The step of the run's best checkpoint; None if the run names none."""
    try:
        return int(json.loads((run_dir / BEST).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def save_module(module: nn.Module, path: Path) -> None:
    """Save a module's tensors as safetensors."""
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, path)


def load_module(module: nn.Module, path: Path) -> None:
    """Load what :func:`save_module` saved; every tensor must match."""
    module.load_state_dict(load_file(path))


def save_optimizer(state: dict[str, Any], stem: Path) -> None:
    """Save an optimizer's state, with full tensors, as `stem`.safetensors and `stem`.json.

    It is saved under the names of the parameters. Hyperparameters are left out: at a resume they come from
    the configuration, which may have changed.
    """
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    values = {f"{names[index]}.{key}": v for index, of in state["state"].items() for key, v in of.items()}
    tensors = {key: v.contiguous() for key, v in values.items() if isinstance(v, torch.Tensor)}
    save_file(tensors, stem.with_suffix(".safetensors"))
    scalars = {key: v for key, v in values.items() if key not in tensors}
    stem.with_suffix(".json").write_text(json.dumps(scalars), encoding="utf-8")


def load_optimizer(optimizer: Optimizer, stem: Path) -> None:
    """Load what :func:`save_optimizer` saved; every process takes its shard.

    Raises:
        UsageError: The state belongs to other parameters, or was saved by an earlier version.
    """
    named = [pair for g in optimizer.param_groups for pair in zip(g["param_names"], g["params"], strict=True)]
    indices = {name: index for index, (name, _) in enumerate(named)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in _saved_values(stem):
        name, kind = key.rsplit(".", 1)
        if name not in indices:
            reason = f"holds the state of '{name}', which is not trained"
            if name.isdecimal():
                reason = (
                    "was written by an earlier version, which numbered the parameters and decayed norms and "
                    "biases; start a new run from the checkpoint's weights with model.model_name_or_path"
                )
            raise UsageError(f"the optimizer state '{stem}.safetensors' {reason}")
        index = indices[name]
        parameter = named[index][1]
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            value = like(value, parameter)
        state.setdefault(index, {})[kind] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _saved_values(stem: Path) -> Iterator[tuple[str, Any]]:
    """What :func:`save_optimizer` saved, one by one: a process that keeps shards never holds all tensors."""
    with safe_open(stem.with_suffix(".safetensors"), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  (the file is no mapping)
            yield key, file.get_tensor(key)
    yield from json.loads(stem.with_suffix(".json").read_text(encoding="utf-8")).items()


def _read_back(path: Path) -> None:
    """Check that a written file can be read: a file system may report success and keep only half of it."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            file.keys()
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
