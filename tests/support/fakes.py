"""Stand-ins for cells of a comparison, for processes that must not load torch."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from uniapl.compare.plan import Cell


def fake_cell(cell: Cell, reference: Path) -> dict[str, Any]:
    """Stands in for training: leaves a mark that it was run."""
    if cell.settings.get("fails"):
        raise RuntimeError("as told")
    if cell.settings.get("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(cell.settings.get("seconds", 0)))
    with (reference.parent / "runs.txt").open("a") as file:
        file.write(f"{cell.name}\n")
    # An optimum that the search has to find in both of its rounds.
    rate, beta = cell.settings.get("optim.learning_rate", 0), cell.settings.get("objective.beta", 0)
    good = 1 - abs(float(rate) - 5e-4) * 100 - abs(float(beta) - 0.02)
    final = {split: {"good": good} for split in ("held_out", "held_out_combinations")}
    return {
        "cell": {"method": cell.method, "settings": cell.settings, "seed": cell.seed},
        "final": final,
        "cost": {"seconds": 0.0},
        "curve": [],
    }


def cells(count: int, **settings: float) -> list[Cell]:
    return [Cell(method="grpo", settings=settings, seed=seed) for seed in range(count)]
