"""`uniapl train RECIPE.yaml [--key value ...] [--quiet | --json]`."""

import contextlib
import functools
import sys
from collections.abc import Sequence

from uniapl.cli import importing
from uniapl.config.resolve import Resolved, load_recipe, resolve
from uniapl.errors import UsageError


def train(arguments: Sequence[str]) -> None:
    """Train by a recipe and flags.

    Raises:
        UniAPLError: See :func:`uniapl.train`.
    """
    shows = [show for show in ("quiet", "json") if f"--{show}" in arguments]
    if len(shows) > 1:
        raise UsageError("--quiet and --json: choose one")
    resolved = resolve_arguments("train", [a for a in arguments if a not in ("--quiet", "--json")])
    with importing():
        from uniapl.training.api import train_resolved
    if shows != ["json"]:
        train_resolved(resolved, show="quiet" if shows else "text")
        return
    # A reward function may print; standard output holds the metrics only.
    metrics = functools.partial(print, file=sys.stdout, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        train_resolved(resolved, show=metrics)


def resolve_arguments(verb: str, arguments: Sequence[str]) -> Resolved:
    """The configuration of `uniapl VERB RECIPE.yaml [--key value ...]`.

    Raises:
        UsageError: There is no recipe, or it is not valid.
    """
    if arguments and not arguments[0].startswith("-"):
        return resolve(load_recipe(arguments[0]), arguments[1:])
    if any(a in ("-h", "--help") for a in arguments):
        return resolve({}, arguments)
    raise UsageError(f"uniapl {verb} needs a recipe: uniapl {verb} RECIPE.yaml [--key value ...]")
