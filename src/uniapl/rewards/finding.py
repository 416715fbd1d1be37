"""The registry of reward functions, and finding others by name."""

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uniapl.errors import UsageError

REGISTRY: dict[str, Callable[..., Any]] = {}


def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function known to `rewards.functions` under `name`."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        REGISTRY[name] = function
        return function

    return add


def find_function(name: str) -> Callable[..., Any]:
    """A registry name, `module:function` or `path.py:function` -> the function.

    Raises:
        UsageError: Nothing there by that name; the message lists what is.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    source, _, attribute = name.rpartition(":")
    if not source:
        raise UsageError(
            f"unknown reward function '{name}': use one of {', '.join(sorted(REGISTRY))}, "
            "or `module:function`, or `path.py:function`"
        )
    try:
        module = _load_file(Path(source).resolve()) if source.endswith(".py") else _import(source)
    except Exception as error:  # the user's own code runs here and may raise anything
        raise UsageError(f"reward function '{name}': cannot import '{source}': {error!r}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"reward function '{name}': '{source}' has no function '{attribute}'")
    return function


def _import(module: str) -> Any:
    """Import by name; modules beside the user, in the working directory, are found too."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(module)


def _load_file(path: Path) -> Any:
    """Run a Python file once; its neighbours can be imported from it."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    name = f"uniapl_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
