"""docs/performance.md: its tables are those of its JSON files, and every benchmark that it names has one."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text()
NAMES = re.findall(r"<!-- (\w+) -->.*?<!-- end -->", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks" / "trl")])


def test_the_tables_are_those_of_the_files() -> None:
    import tables

    assert tables.filled(PAGE, ROOT / "docs" / "performance") == PAGE


def test_every_table_has_its_command() -> None:
    for name in NAMES:
        assert f"--json docs/performance/{name}.json" in PAGE
        assert f"benchmarks/trl/{name}.py" in PAGE or f"benchmarks/{name}.py" in PAGE


def test_a_table_says_what_the_file_says(tmp_path: Path) -> None:
    import tables

    row = {"name": "uniapl", "median": 2.0, "low": 1.5, "high": 2.5, "times": 1.0, "of_limit": 0.25}
    shape = {"model": "20m", "prompts": 2, "prompt_length": 64, "generations": 8, "completion_length": 32}
    machine = {"device": "CPU", "cores": 2, "threads": 1, "precision": "fp32", "matmul_flops": 1e11}
    machine |= {"copy_bytes": 5e9, "torch": "2", "transformers": "5", "trl": "1"}
    table = {"title": "update", "shape": shape | {"vocabulary": 1000}, "rows": [row], "difference": 3e-7}
    found = {"benchmark": "update", "machine": machine, "tables": [table]}
    (tmp_path / "update.json").write_text(json.dumps(found))
    page = tables.filled("before\n<!-- update -->\nold\n<!-- end -->\nafter\n", tmp_path)
    assert page.startswith("before\n<!-- update -->\n\nCPU, 2 cores, 1 threads, fp32, 100 GFLOP/s, 5.0 GB/s")
    assert "| uniapl | 2.00 | 1.50 to 2.50 | 1.00 | 25% |" in page
    assert "agree to 3e-07" in page
    assert "old" not in page
    assert page.endswith("\n\n<!-- end -->\nafter\n")
