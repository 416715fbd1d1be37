"""The registry of reward functions, and lookup of others by module or file."""

import difflib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from uniapl.errors import UsageError
from uniapl.rewards.neighbours import load_file, load_module

REGISTRY: dict[str, Callable[..., Any]] = {}


def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that makes a function available to `rewards.functions` under `name`."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        REGISTRY[name] = function
        return function

    return add


def find_function(
    name: str, *, kind: Literal["reward function", "tool", "environment"] = "reward function"
) -> Callable[..., Any]:
    """The function that `name` refers to: `module:function`, `path.py:function`, or a reward's registry name.

    Of kind "environment" it is a class, or a function that returns its instances.

    Raises:
        UsageError: It does not exist, or its module cannot be imported.
    """
    if kind == "reward function" and name in REGISTRY:
        return REGISTRY[name]
    source, _, attribute = name.rpartition(":")
    thing = "class" if kind == "environment" else "function"
    if not source and kind != "reward function":
        form = thing.replace("class", "Class")
        raise UsageError(f"unknown {kind} '{name}': use `module:{form}` or `path.py:{form}`")
    if not source:
        raise UsageError(
            f"unknown reward function '{name}': use one of {', '.join(sorted(REGISTRY))}, "
            f"or `module:function`, or `path.py:function`{_meant(name, sorted(REGISTRY))}"
        )
    try:
        module = _load_file(Path(source).resolve()) if source.endswith(".py") else _import(source)
    except Exception as error:  # the user's code runs here and may raise anything
        raise UsageError(f"{kind} '{name}': cannot import '{source}': {error!r}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(
            f"{kind} '{name}': '{source}' has no {thing} '{attribute}'{_defined(module, attribute, thing)}"
        )
    return function


def _defined(module: ModuleType, attribute: str, thing: str) -> str:
    """The end of an error: the functions or classes that a module itself defines."""
    is_one = inspect.isclass if thing == "class" else inspect.isfunction
    own = [
        name for name, value in vars(module).items() if is_one(value) and value.__module__ == module.__name__
    ]
    return f"; it defines: {', '.join(own):.200}{_meant(attribute, own)}" if own else ""


def _meant(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f". Did you mean '{near[0]}'?" if near else ""


def _import(module: str) -> Any:
    """Import a module by name, also from the working directory."""
    _add_to_path(os.getcwd())
    return load_module(module, Path.cwd())


def _load_file(path: Path) -> Any:
    """Import a Python file once; it can import the files in its directory."""
    # For other processes and for importlib.import_module; last, so that no other module's imports change.
    _add_to_path(str(path.parent))
    return load_file(path)


def _add_to_path(directory: str) -> None:
    if directory not in sys.path:
        sys.path.append(directory)
