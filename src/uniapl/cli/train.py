"""`uniapl train`: train a model with a recipe."""

import contextlib
import functools
import sys
from collections.abc import Sequence

from uniapl.cli import importing
from uniapl.config.resolve import Resolved, load_recipe, resolve
from uniapl.errors import UsageError


def train(arguments: Sequence[str]) -> None:
    """`uniapl train RECIPE.yaml [--key value ...] [--quiet | --json]`.

    Raises:
        UniAPLError: See :func:`uniapl.train`.
    """
    quiet, as_json = "--quiet" in arguments, "--json" in arguments
    if quiet and as_json:
        raise UsageError("--quiet and --json cannot be combined: choose one")
    resolved = resolve_arguments("train", [a for a in arguments if a not in ("--quiet", "--json")])
    with importing():
        from uniapl.training.api import train_resolved
    if not as_json:
        train_resolved(resolved, show="quiet" if quiet else "text")
        return
    # Reward functions may print, and standard output must contain only the metrics.
    metrics = functools.partial(print, file=sys.stdout, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        train_resolved(resolved, show=metrics)


def resolve_arguments(verb: str, arguments: Sequence[str]) -> Resolved:
    """The configuration of `uniapl VERB RECIPE.yaml [--key value ...]`.

    Raises:
        UsageError: The recipe is missing or not valid.
    """
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"uniapl {verb} needs a recipe: uniapl {verb} RECIPE.yaml [--key value ...]")
    return resolve(load_recipe(arguments[0]), arguments[1:], path=arguments[0])
