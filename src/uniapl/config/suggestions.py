"""Errors for unknown keys and flags, with the key that was probably meant."""

import difflib

from uniapl.config import Config
from uniapl.config.other_libraries import NO_EQUIVALENT, OTHER_NAMES
from uniapl.config.section import flatten


def unknown(name: str, kind: str = "key") -> str:
    """The error for an unknown key, or for an unknown flag (kind "flag", with its dashes)."""
    key = name.removeprefix("--").replace("-", "_")
    return f"unknown {kind} '{name:.80}'{suggestion(key, as_flag=kind == 'flag')}"


def suggestion(key: str, *, as_flag: bool = False) -> str:
    """The end of the error: the key that was probably meant, why there is none, or how to list all keys."""
    known = flatten(Config())
    leaf = key.rsplit(".", 1)[-1]
    # Of keys with the same leaf the first is meant, and of the two optimizers the policy's.
    ordered = sorted(known, key=lambda name: name.startswith("discriminator."))
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(ordered)}
    best = OTHER_NAMES.get(key) or OTHER_NAMES.get(leaf) or by_leaf.get(leaf)
    if best is None and (reason := NO_EQUIVALENT.get(key) or NO_EQUIVALENT.get(leaf)):
        return f"; it has no equivalent: {reason}"
    if best is None:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        near = near or [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.75)]
        best = near[0] if near else None
    if best is None:
        return "; `uniapl train --help-all` lists all keys"
    if not as_flag:
        return f"; did you mean '{best}'?"
    name, *explanation = best.split(" ", 1)
    if name in Config.model_fields and name not in known:  # a section
        return f"; did you mean the flags '--{name.replace('_', '-')}.*'?"
    shown = " ".join([f"--{name.replace('_', '-')}", *explanation])
    return f"; did you mean '{shown}'?"
