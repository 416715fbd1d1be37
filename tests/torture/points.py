"""Where a child kills itself: just before, half-way through or just after the n-th call of a function.

The functions are those through which a run touches the disk. They are replaced in the child alone.
"""

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import transformers.modeling_utils
from transformers import PreTrainedTokenizerBase

from uniapl.training.checkpoint import directory as checkpoint

Call = Callable[..., Any]

FUNCTIONS: dict[str, list[tuple[Any, str]]] = {
    "fsync": [(os, "fsync")],
    "rename": [(os, "rename")],
    "replace": [(os, "replace")],
    "mkdir": [(os, "mkdir")],
    "rmdir": [(os, "rmdir")],
    "unlink": [(os, "unlink")],
    "rmtree": [(shutil, "rmtree")],
    "write_text": [(Path, "write_text")],
    "save_tensors": [(checkpoint, "save_file"), (transformers.modeling_utils, "safe_save_file")],
    "save_tokenizer": [(PreTrainedTokenizerBase, "save_pretrained")],
}
"""Name -> the places where the function is looked up."""
APPEND = "append"
"""A line of a log: a write to a file that was opened to be appended to."""


def _half_text(original: Call, path: Path, text: str, **settings: Any) -> None:
    original(path, text[: len(text) // 2], **settings)


def _half_tensors(_: Call, tensors: Any, path: Any, metadata: Any = None) -> None:
    content = safetensors.torch.save(tensors, metadata)
    Path(path).write_bytes(content[: len(content) // 2])


def _half_line(original: Call, text: str) -> None:
    original(text[: len(text) // 2])
    _flush(original)


HALVES: dict[str, Call] = {
    "write_text": _half_text,
    "save_tensors": _half_tensors,
    APPEND: _half_line,
}
POINTS = tuple(
    f"{when} {name}"
    for name in (*FUNCTIONS, APPEND)
    for when in ("before", "half", "after")
    if when != "half" or name in HALVES
)


def _flush(original: Call) -> None:
    """What was written reaches the file, where the function is a file's `write`."""
    file = getattr(original, "__self__", None)
    if hasattr(file, "flush"):
        file.flush()


def die() -> None:
    """As a kill from outside: nothing is flushed, nothing is cleaned."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, number: int) -> None:
    """Have this process die at the n-th time that it comes to a point."""
    when, name = point.split()
    left = number

    def instead(original: Call, *arguments: Any, **settings: Any) -> Any:
        nonlocal left
        left -= 1
        if left:
            return original(*arguments, **settings)
        if when == "half":
            HALVES[name](original, *arguments, **settings)
        elif when == "after":
            original(*arguments, **settings)
            _flush(original)
        die()

    _replace(name, instead)


def count(path: Path) -> None:
    """Have this process keep in `path` how often it has called each function."""
    calls = dict.fromkeys((*FUNCTIONS, APPEND), 0)

    def counting(name: str) -> Call:
        def instead(original: Call, *arguments: Any, **settings: Any) -> Any:
            calls[name] += 1
            # Not by Path.write_text, which is among those that are counted.
            with open(path, "w") as file:
                json.dump(calls, file)
            return original(*arguments, **settings)

        return instead

    for name in calls:
        _replace(name, counting(name))


def _replace(name: str, instead: Call) -> None:
    if name == APPEND:
        _replace_append(instead)
        return
    for owner, attribute in FUNCTIONS[name]:
        original = getattr(owner, attribute)
        setattr(owner, attribute, _bound(original, instead))


def _bound(original: Call, instead: Call) -> Call:
    # A function, not a partial: as an attribute of a class it has to bind `self`.
    @functools.wraps(original)
    def replaced(*arguments: Any, **settings: Any) -> Any:
        return instead(original, *arguments, **settings)

    return replaced


def _replace_append(instead: Call) -> None:
    opened = Path.open

    def open_(path: Path, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
        file: Any = opened(path, mode, *arguments, **settings)
        if mode == "a":
            file.write = _bound(file.write, instead)
        return file

    Path.open = open_  # type: ignore[assignment,method-assign]
