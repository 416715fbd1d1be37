"""The plan: equal budgets, settings of every stage, and test prompts that the search did not use."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from uniapl.compare import plan, results
from uniapl.compare.plan import PIPELINES, SETTINGS, Cell
from uniapl.config import Config
from uniapl.config.resolve import resolve, stages_of


def stages(method: str, **settings: float | int | str) -> list[Config]:
    cell = Cell(method=method, settings={**SETTINGS[method], **settings}, seed=3)
    recipe = cell.recipe | {"model": {"model_name_or_path": "base"}}
    return [stage.config for stage in stages_of(resolve(recipe))]


@pytest.mark.parametrize("method", PIPELINES)
def test_every_method_has_the_same_budget(method: str) -> None:
    default = {"batching.demonstrations_per_step": 128} if method == "sft" else {}
    rollouts = demonstrations = 0
    for stage in stages(method, **default):
        if stage.objective.uses_rollouts:
            per_step = stage.batching.prompts_per_step * stage.rollout.num_generations
            rollouts += stage.max_steps * per_step
        if stage.objective.learns_from_demonstrations:
            demonstrations += stage.max_steps * stage.batching.demonstrations_per_step
    if method == "sft":
        assert (rollouts, demonstrations) == (0, plan.ROLLOUTS + plan.DEMONSTRATIONS)
    else:
        assert rollouts == plan.ROLLOUTS == 9_600
        assert demonstrations == (0 if method in ("grpo", "a-grpo", "gad") else plan.DEMONSTRATIONS)


@pytest.mark.parametrize("method", PIPELINES)
def test_settings_apply_to_every_stage_of_the_method(method: str) -> None:
    knob, values = plan.KNOBS[method]
    section, key = knob.split(".")
    for stage in stages(method, **{"optim.learning_rate": 0.125, knob: values[-1]}):
        assert stage.optim.learning_rate == 0.125
        assert stage.seed == 3
        fixed_by_sft = stage.method == "sft" and section == "objective"
        assert fixed_by_sft or getattr(getattr(stage, section), key) == values[-1]
    assert "->" not in method or len(stages(method)) == 2


def test_other_methods_keep_their_own_mu() -> None:
    (chord,) = stages("chord-mu")
    assert chord.objective.mu_peak == 0.9
    (phi,) = stages("chord-phi", **{"objective.mu_valley": 0.3})
    assert (phi.objective.mu_peak, phi.objective.mu_valley) == (0.3, 0.3)


def test_cells_have_unique_names() -> None:
    cells = [
        *(cell for method in PIPELINES for cell in plan.search_cells(method, [0.5, 1.0])),
        *(cell for method in PIPELINES for cell in plan.search_cells(method, [0.5], [0.0, 1.0])),
        *plan.table_cells(list(PIPELINES), 3),
        *(cell for cells in plan.ablation_cells(3).values() for cell in cells),
    ]
    different = {repr(cell) for cell in cells}
    assert len({cell.name for cell in cells}) == len(different)


def test_a_front_contains_the_cell_of_the_table() -> None:
    for method, (knob, values) in plan.FRONTS.items():
        assert SETTINGS[method][knob] in values
        (ours,) = plan.table_cells([method], 1)
        assert ours.name in {cell.name for cell in plan.front_of(method, 0)}


DRAWN_APART = """
from uniapl.compare.cell import task_of
from uniapl.compare.plan import SEARCH_SEED, Cell
from uniapl.demo.task import make_task

searched = task_of(Cell(method="sft", settings={}, seed=SEARCH_SEED)).texts
assert searched == make_task(seed=SEARCH_SEED).texts
for seed in (0, 1):
    task = task_of(Cell(method="sft", settings={"demonstrations": 64}, seed=seed))
    assert not task.texts & searched
    assert len(task.demonstrations) == 64
    assert len(task.texts) == 1024 + 256 + 256
"""


def test_test_cells_share_no_prompt_with_the_search() -> None:
    """In a separate process, because the type checks of the tests slow the drawing of texts down."""
    subprocess.run([sys.executable, "-c", DRAWN_APART], check=True)


RESULTS = Path(__file__).parents[2] / "docs" / "compare" / "results.json"


def published() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_settings_are_those_of_the_search() -> None:
    found = published()["search"]
    for method, settings in found.items():
        assert settings.items() <= SETTINGS[method].items(), method


def test_the_published_table_agrees_with_the_results() -> None:
    header, *body = [f"| {' | '.join(row)} |" for row in results.short_table(published()["table"])]
    text = "\n".join([header, "|---" * (header.count("|") - 1) + "|", *body])
    assert text in (RESULTS.parents[1] / "choosing-a-method.md").read_text(encoding="utf-8")
