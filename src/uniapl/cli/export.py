"""`uniapl export`: write the model of a run or a checkpoint in the format of transformers."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from uniapl.config import ModelConfig
from uniapl.errors import UsageError
from uniapl.models.loading import ModelSource, load_model, load_tokenizer
from uniapl.models.lora import is_adapter
from uniapl.report.reading import END_STATE
from uniapl.training.checkpoint import directory as checkpoint_directory


def export(arguments: Sequence[str]) -> None:
    """Write the model of a run or a checkpoint to a directory; an adapter is merged into its base.

    Raises:
        UsageError: There is no model, it is damaged, or the directory exists or cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="uniapl export",
        description="Write the model of a run or a checkpoint to a directory. An adapter is merged.",
    )
    parser.add_argument(
        "source", metavar="RUN_OR_CHECKPOINT", type=Path, help="directory of a run, a checkpoint or a model"
    )
    parser.add_argument(
        "-o", "--output", metavar="DIRECTORY", type=Path, required=True, help="directory to create"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision of the weights that are written; training uses float32",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )
    options = parser.parse_args(arguments)
    source = _source(options.source)
    # Resolve links, so that a link given by the user is kept.
    output = Path(os.path.realpath(options.output))
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UsageError(f"'{options.output}' already exists: choose another directory, or delete it")
        if output.is_mount() or output == Path.cwd():
            raise UsageError(f"'{options.output}' cannot be replaced: name a new directory inside it")
        config = ModelConfig(model_name_or_path=str(source), trust_remote_code=options.trust_remote_code)
        found = ModelSource.resolve(config)
        tokenizer: Any = load_tokenizer(found)
        model = _converted(load_model(found), options.dtype)

        def fill(directory: Path) -> None:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)

        checkpoint_directory.write_directory(output, fill)
    except OSError as error:
        raise UsageError(f"'{options.output}' cannot be written: {error}") from error
    merged = ", with its adapter merged" if is_adapter(source) else ""
    print(f"wrote the model of {source} to {options.output}{merged}")


def _converted(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The model in another precision.

    Raises:
        UsageError: A weight is too large for it.
    """
    finite = {name: bool(parameter.isfinite().all()) for name, parameter in model.named_parameters()}
    model = model.to(getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if finite[name] and not parameter.isfinite().all():
            raise UsageError(f"--dtype {dtype}: {name} has values beyond its range; use --dtype bfloat16")
    return model


def _source(path: Path) -> Path:
    """The directory with the weights that `path`, a run, a checkpoint or a model, refers to."""
    saved = checkpoint_directory.checkpoints(path)
    found = path / "final" if saved or (path / "final").is_dir() else path
    if saved and not found.is_dir():
        raise UsageError(f"the run '{path}' has no final model yet; its newest checkpoint is {saved[-1]}")
    if saved and not _is_finished(path):
        raise UsageError(
            f"the run '{path}' was continued after its final model was written and has not finished: export "
            f"{found} or {saved[-1]}"
        )
    if (found / checkpoint_directory.MANIFEST).is_file() and (defects := checkpoint_directory.defects(found)):
        raise UsageError(f"'{found}' is damaged: {'; '.join(defects)}")
    if not (is_adapter(found) or (found / "config.json").is_file()):
        raise UsageError(f"'{path}' is not the directory of a run, a checkpoint or a model")
    return found


def _is_finished(run: Path) -> bool:
    try:
        return json.loads((run / END_STATE).read_text(encoding="utf-8"))["state"] == "finished"
    except (OSError, ValueError, LookupError, TypeError):
        return False
