"""What the fuzz tests share: odd values, a small recipe, and what a clear answer to the user is.

UNIAPL_FUZZ_EXAMPLES=20 tries twenty times as many inputs, and other ones with each --hypothesis-seed.
"""

import contextlib
import io
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from uniapl import cli

TIMES = int(os.environ.get("UNIAPL_FUZZ_EXAMPLES", "1"))
LONGEST_MESSAGE = 6000
ODD_TEXTS = [
    "", " ", "\n", "\t\r", "\0", "a\0b", "\ud800", "\x1b[31m", "\u202e", "\ufeff", "👧", "é" * 300,
    "x" * 10_000, "<eos>", "<pad><eos>", "<turn>", "[bold]", "{{ 1 }}", "{% raw %}", "null", "true", "-1",
    "1e400", "..", "/", "~", "a/b", "a/b/c", "--seed", "%s", "{}", "[]", "say a.",
]  # fmt: skip
ODD_NUMBERS = [0, 1, -1, 2**31, 2**63, -(2**64), 10**400, 0.0, -0.5, 1e-300, 1e308, math.nan, math.inf]

texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=20)
scalars = st.none() | st.booleans() | st.sampled_from(ODD_NUMBERS) | st.integers() | st.floats() | texts
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


def tries(count: int) -> Callable[[Any], Any]:
    """Settings of a fuzz test: the same inputs every time, unless somebody hunts for longer."""
    unhurried = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        deadline=None,
        database=None,
        suppress_health_check=[*unhurried, HealthCheck.function_scoped_fixture],
    )


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str


def say(*arguments: str) -> Said:
    """Run a command with the streams that a terminal gives it: what is no UTF-8 text cannot be printed."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = cli.run(list(arguments))
        except SystemExit as end:
            code = end.code
    written = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return Said(code=code, out=written[0], err=written[1])


def assert_clear(said: Said, *names: str, by_parser: bool = False) -> None:
    """Success, or exit code 2 and one message in words; with `names`, one that has one of them in it.

    Args:
        by_parser: The parser of flags may have answered instead, with the flags that there are.
    """
    assert said.code in (0, 2), said
    assert "Traceback" not in said.out + said.err
    assert "TypeCheckError" not in said.err, said
    if said.code == 0:
        return
    if by_parser and not said.err.startswith("error: "):
        assert "For full helptext" in said.err, said
        return
    assert len(re.findall("^error: ", said.err, re.MULTILINE)) == 1, said
    message = said.err[said.err.index("error: ") + len("error: ") :].strip()
    assert len(message) < LONGEST_MESSAGE, f"{len(message)} characters: {message[:500]}"
    assert not re.fullmatch(r"\w*(Error|Exception)?\(.*\)|'.*'", message, re.DOTALL), message
    assert len(message.split()) > 3, message
    if names:
        assert any(name in message for name in names), message


def small_recipe(model: Path, folder: Path) -> dict[str, Any]:
    """One step of everything on a tiny model; its data are in `folder`."""
    return {
        "output_dir": str(folder / "run"),
        "max_steps": 1,
        "model": {"model_name_or_path": str(model)},
        "data": {"path": str(folder / "train.jsonl")},
        "rollout": {"num_generations": 2, "max_completion_length": 3},
        "objective": {"beta": 0.0},
        "discriminator": {"warmup_steps": 0, "updates_per_step": 1},
        "batching": {"prompts_per_step": 2, "demonstrations_per_step": 2},
        "rewards": {"functions": ["lowercase"]},
    }
