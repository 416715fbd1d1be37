"""Benchmark files: small stand-ins of the same formats, and the real ones where a machine has them.

A test that takes `benchmarks` runs on the stand-ins everywhere. It also runs on the real files, with the
marker `real_data`, if DATA contains them.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

DATA = Path(os.environ.get("UNIAPL_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
STAND_INS = Path(__file__).with_name("stand_ins")
# Relative to DATA or STAND_INS.
IFEVAL = Path("ifeval", "input_data.jsonl")
IFBENCH = Path("ifbench", "IFBench_test.jsonl")
AUTOIF = Path("autoif")
GSM8K = Path("gsm8k", "train.jsonl")
NLTK = Path("nltk")

real_data = (
    pytest.mark.real_data,
    pytest.mark.skipif(
        not (DATA / IFEVAL).is_file(),
        reason=f"real benchmark files: {DATA} does not contain them (set UNIAPL_TEST_DATA to their folder)",
    ),
)
on_stand_ins_and_real_data = pytest.mark.parametrize(
    "benchmarks",
    [pytest.param(STAND_INS, id="stand-ins"), pytest.param(DATA, id="real", marks=real_data)],
)
CONSTANT = '"<<ok>> *a* *b* *c* [x] [y] [z] P.S. ok. ok. ok"'
"""One answer to every prompt; it satisfies more of IFEval than many a model."""


class FirstDraw:
    """Stands in for `random` in lm-eval, whose checker draws a letter where a prompt asks for "#" or "!"."""

    @staticmethod
    def choice(options: Any) -> Any:
        return random.Random(0).choice(options)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
