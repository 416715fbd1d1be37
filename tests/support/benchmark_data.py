"""Benchmark prompts and NLTK's data beside the repository; tests that need them skip where they are not."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

DATA = Path(os.environ.get("UNIAPL_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
IFEVAL = DATA / "ifeval" / "input_data.jsonl"
IFBENCH = DATA / "ifbench" / "IFBench_test.jsonl"
AUTOIF = DATA / "autoif"
NLTK = DATA / "nltk"

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"{DATA} is not there (UNIAPL_TEST_DATA names another place)"
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
