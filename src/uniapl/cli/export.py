"""`uniapl export`: write the model of a run or a checkpoint in the format of transformers, or upload it."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from uniapl.cli.hub import open_repository, upload
from uniapl.config import ModelConfig
from uniapl.errors import UsageError
from uniapl.models.loading import ModelSource, load_model, load_tokenizer
from uniapl.models.lora import base_of_adapter, is_adapter
from uniapl.report.reading import END_STATE
from uniapl.training.checkpoint import directory as checkpoint_directory
from uniapl.training.checkpoint.best import model_files
from uniapl.training.checkpoint.model_card import CARD, merged_card


def export(arguments: Sequence[str]) -> None:
    """Write the model of a run or a checkpoint, with an adapter merged, or upload it to the Hub.

    Raises:
        UsageError: There is no model, it is damaged, the directory exists or cannot be written, or the
            repository on the Hub cannot be opened.
        UniAPLError: The upload failed.
    """
    options = _parse(arguments)
    source = _source(options.source)
    output: Path | None = None
    if options.output is not None:
        # Resolve links, so that a link given by the user is kept.
        output = Path(os.path.realpath(options.output))
        _check_output(output, options.output)
    elif options.push_to_hub is not None:
        _check_upload(source)
    repository = None
    if options.push_to_hub is not None:
        # Before the export, which takes minutes for a large model.
        repository = open_repository(options.push_to_hub, private=options.hub_private_repo)
    if output is not None:
        _write(source, output, options)
        merged = ", with its adapter merged" if is_adapter(source) else ""
        print(f"wrote the model of {source} to {options.output}{merged}")
    if repository is not None:
        names = upload(output or source, repository)
        print(f"uploaded {', '.join(names)} to {repository}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uniapl export",
        description="Write the model of a run or a checkpoint to a directory, with an adapter merged (-o), "
        "or upload it to the Hugging Face Hub as it is (--push-to-hub). With both, what was written is "
        "uploaded.",
    )
    add = parser.add_argument
    help_ = "directory of a run, a checkpoint or a model"
    add("source", metavar="RUN_OR_CHECKPOINT", type=Path, help=help_)
    add("-o", "--output", metavar="DIRECTORY", type=Path, help="directory to create")
    help_ = "precision of the weights that -o writes (default: float32, as in training)"
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=help_)
    help_ = "upload to this repository, which is created if needed; log in with `hf auth login` or HF_TOKEN"
    add("--push-to-hub", metavar="USER/NAME", help=help_)
    help_ = "create the repository as private; a public one that exists is refused"
    add("--hub-private-repo", action="store_true", help=help_)
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    options = parser.parse_args(arguments)
    if options.output is None and options.push_to_hub is None:
        raise UsageError("nothing to do: give -o DIRECTORY, --push-to-hub USER/NAME, or both")
    if options.dtype is not None and options.output is None:
        raise UsageError("--dtype converts the weights that -o writes: give -o DIRECTORY")
    if options.hub_private_repo and options.push_to_hub is None:
        raise UsageError("--hub-private-repo needs --push-to-hub USER/NAME")
    return options


def _check_upload(source: Path) -> None:
    """Check that a model can be uploaded as it is.

    Raises:
        UsageError: It was not saved by a run, or is an adapter whose base model is a local directory.
    """
    if not model_files(source):
        raise UsageError(
            f"'{source}' has no {checkpoint_directory.MANIFEST} that lists the files of its model: add "
            "-o DIRECTORY, which writes one"
        )
    if is_adapter(source) and Path(base := base_of_adapter(source)[0]).exists():
        raise UsageError(
            f"the base model of the adapter '{source}' is the local directory '{base}', which other users do "
            "not have: add -o DIRECTORY to upload the merged model"
        )


def _check_output(output: Path, shown: Path) -> None:
    """Raise a UsageError if the directory exists, or cannot be replaced or read."""
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UsageError(f"'{shown}' already exists: choose another directory, or delete it")
        if output.is_mount() or output == Path.cwd():
            raise UsageError(f"'{shown}' cannot be replaced: name a new directory inside it")
    except OSError as error:
        raise UsageError(f"'{shown}' cannot be written: {error}") from error


def _write(source: Path, output: Path, options: argparse.Namespace) -> None:
    """Write the model with any adapter merged.

    Raises:
        UsageError: The directory cannot be written, or the model cannot be loaded.
    """
    try:
        config = ModelConfig(model_name_or_path=str(source), trust_remote_code=options.trust_remote_code)
        found = ModelSource.resolve(config)
        tokenizer: Any = load_tokenizer(found)
        model = _converted(load_model(found), options.dtype or "float32")
        card = source / CARD

        def fill(directory: Path) -> None:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            if card.is_file():
                text = card.read_text(encoding="utf-8", errors="surrogateescape")
                text = merged_card(text) if is_adapter(source) else text
                (directory / CARD).write_text(text, encoding="utf-8", errors="surrogateescape")

        checkpoint_directory.write_directory(output, fill)
    except OSError as error:
        raise UsageError(f"'{options.output}' cannot be written: {error}") from error


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
    defects = checkpoint_directory.defects(found) if (found / checkpoint_directory.MANIFEST).is_file() else ()
    # Users edit the model card.
    if defects := [defect for defect in defects if not defect.startswith(f"{CARD}: ")]:
        raise UsageError(f"'{found}' is damaged: {'; '.join(defects)}")
    if not (is_adapter(found) or (found / "config.json").is_file()):
        raise UsageError(f"'{path}' is not the directory of a run, a checkpoint or a model")
    return found


def _is_finished(run: Path) -> bool:
    try:
        return json.loads((run / END_STATE).read_text(encoding="utf-8"))["state"] == "finished"
    except (OSError, ValueError, LookupError, TypeError):
        return False
