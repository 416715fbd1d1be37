"""`uniapl export`: the model of a run or a checkpoint, whole, as transformers loads it."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uniapl.config import ModelConfig
from uniapl.errors import UsageError
from uniapl.models.loading import ModelSource, load_model, load_tokenizer
from uniapl.models.lora import is_adapter
from uniapl.report.reading import ENDING
from uniapl.training.checkpoint import directory as checkpoint


def export(arguments: Sequence[str]) -> None:
    """Write a run's result, or a checkpoint's weights, to a directory; an adapter is merged into its base.

    Raises:
        UsageError: There is no model, it is damaged, or the directory is taken or cannot be written.
    """
    options = _parser().parse_args(arguments)
    source = _source(options.source)
    # Where a link leads to: the link itself is the user's, and stays.
    output = Path(os.path.realpath(options.output))
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UsageError(f"'{options.output}' is there already: choose another directory, or delete it")
        if output.is_mount() or output == Path.cwd():
            raise UsageError(f"'{options.output}' cannot be replaced by another: name a new directory in it")
        config = ModelConfig(model_name_or_path=str(source), trust_remote_code=options.trust_remote_code)
        found = ModelSource.resolve(config)
        tokenizer: Any = load_tokenizer(found)
        model = load_model(found)

        def fill(directory: Path) -> None:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)

        checkpoint.write_directory(output, fill)
    except OSError as error:
        raise UsageError(f"'{options.output}' cannot be written: {error}") from error
    merged = ", its adapter merged" if is_adapter(source) else ""
    print(f"{options.output}: the model of {source}{merged}")


def _source(path: Path) -> Path:
    """Where the weights lie that are meant by a run's directory or a model's own."""
    saved = checkpoint.checkpoints(path)
    found = path / "final" if saved or (path / "final").is_dir() else path
    if saved and not found.is_dir():
        raise UsageError(f"the run '{path}' has no result yet; its newest checkpoint is {saved[-1]}")
    if saved and not _is_finished(path):
        raise UsageError(
            f"the run '{path}' went on after its result was written, and has not ended: name what you want, "
            f"{found} or {saved[-1]}"
        )
    if (found / checkpoint.MANIFEST).is_file() and (wrong := checkpoint.defects(found)):
        raise UsageError(f"'{found}' is damaged: {'; '.join(wrong)}")
    if not (is_adapter(found) or (found / "config.json").is_file()):
        raise UsageError(f"'{path}' is no directory of a run, a checkpoint or a model")
    return found


def _is_finished(run: Path) -> bool:
    try:
        return json.loads((run / ENDING).read_text(encoding="utf-8"))["state"] == "finished"
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uniapl export", description=export.__doc__)
    add = parser.add_argument
    add("source", metavar="RUN_OR_CHECKPOINT", type=Path, help="its directory; any model's will do")
    add("-o", "--output", metavar="DIRECTORY", type=Path, required=True, help="a new directory")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return parser
