"""At Qwen3's vocabulary size, chunked log-probabilities need less than a quarter of the memory."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

NEEDED = 6 * 2**30
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "logprob_memory.py"


def test_peak_memory(tmp_path: Path) -> None:
    """2,048 tokens, V = 151,936: the full computation holds three tensors of 1.2 GiB at once."""
    if psutil.virtual_memory().available < NEEDED:
        pytest.skip(f"the full computation needs {NEEDED / 2**30:.0f} GiB of free memory")
    output = tmp_path / "memory.json"
    subprocess.run(
        [sys.executable, str(BENCHMARK), "--hidden", "16", "--tokens", "2048", "--json", str(output)],
        check=True,
    )
    results = json.loads(output.read_text())
    full, chunked = results["full"], results["chunked"]
    assert chunked["logprob_sum"] == pytest.approx(full["logprob_sum"], rel=1e-5)
    assert chunked["grad_norm"] == pytest.approx(full["grad_norm"], rel=1e-3)
    assert chunked["bytes"] < full["bytes"] / 4
