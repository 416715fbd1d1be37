"""benchmarks/gpu: its tables, its packages and the outcome of its stages; `make gpu-check-tiny` runs them."""

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
WITH_TRANSFORMERS = {"filelock", "numpy", "pyyaml", "safetensors"}
"""Dependencies of ours that are dependencies of transformers."""


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [str(ROOT / "benchmarks" / name) for name in ("trl", "gpu")]
    monkeypatch.setattr(sys, "path", [*sys.path, *places])


def test_the_readme_names_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split("[<>=]", text)[0] for text in project["dependencies"]}
    named = {name.lower() for name in re.findall(r"[\w-]+", README)}
    assert {"torch"} == {name for name in required - WITH_TRANSFORMERS if name not in named}


def test_the_wheels_have_the_versions_of_the_constraints() -> None:
    def pinned(text: str) -> dict[str, str]:
        pairs = re.findall(r"([\w-]+)==([\d.]+)", text)
        return {name.replace("_", "-").lower(): version for name, version in pairs}

    wheels, constraints = pinned(README), pinned((ROOT / "constraints.txt").read_text())
    assert len(wheels) == 12
    assert wheels == {name: constraints[name] for name in wheels}


def test_a_table_has_the_figures_of_its_file() -> None:
    import tables

    check = {"name": "gradient", "value": 0.00123, "bound": 0.05, "relation": "at most", "passed": True}
    failed = {"name": "packing", "value": 0.0, "bound": 1, "relation": "at least", "passed": False}
    rows = [
        {"name": "update: uniapl", "seconds": 0.3125, "peak_bytes": 3 * 2**29, "tokens_per_second": 98765.4},
        {"name": "update: TRL", "error": "out of memory"},
    ]
    targets = [
        {"name": "speed", "value": 1.625, "target": 1.5, "met": True},
        {"name": "rollouts", "value": None, "target": 4.0, "met": False},
    ]
    found: dict[str, Any] = {
        "benchmark": "gpu_speed",
        "device": "NVIDIA H100",
        "tiny": False,
        "torch": "2.11",
    }
    found |= {"transformers": "5.17", "checks": [check, failed], "rows": rows, "targets": targets}
    page = tables.render(found)
    assert page.startswith("NVIDIA H100, torch 2.11, transformers 5.17.\n")
    assert "| gradient | 0.0012 | at most 0.05 | yes |" in page
    assert "| packing | 0 | at least 1 | **no** |" in page
    assert "|  | seconds | peak GiB | tokens per second | error |" in page
    assert "| update: uniapl | 0.312 | 1.5 | 98,765 |  |" in page
    assert "| update: TRL |  |  |  | out of memory |" in page
    assert "| speed | 1.62 | 1.5 | yes |" in page
    assert "| rollouts |  | 4 | **no** |" in page


def test_a_stage_that_fails_or_hangs_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import check

    stages = {
        "equivalence": "raise SystemExit(1)",
        "speed": "import time; time.sleep(60)",
        "resume": "import uniapl; print('version', uniapl.__version__)",
    }
    for name, code in stages.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setattr(check, "HERE", tmp_path)
    monkeypatch.setattr(check, "STAGES", {"equivalence": 30, "speed": 1, "resume": 30})
    monkeypatch.setattr(sys, "argv", ["check.py", "--tiny", "--output", str(tmp_path / "out")])
    assert check.main() == 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == {
        "equivalence": "failed with exit code 1",
        "speed": "stopped after 1 s",
        "resume": "passed",
    }
    assert "version 0.1.0" in capfd.readouterr().out
