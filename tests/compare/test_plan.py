"""Methods as text, and the recipes of cells."""

from typing import Any

import pytest

from uniapl.compare.budget import budget_of
from uniapl.compare.plan import SEARCH_SEED, Plan, Variant, parse_methods
from uniapl.config import Config
from uniapl.config.methods import METHODS
from uniapl.config.resolve import resolve, stages_of
from uniapl.errors import UsageError

RECIPE: dict[str, Any] = {
    "method": "uniapl",
    "output_dir": "elsewhere",
    "model": {"model_name_or_path": "base"},
    "data": {"path": "rows.jsonl", "columns": {"problem": "prompt"}},
    "rewards": {"functions": ["lowercase"]},
    "objective": {"mu_valley": 0.3, "epsilon": 0.1, "lambda_adv": 3.0},
    "optim": {"learning_rate": 1e-4},
    "rollout": {"num_generations": 8},
}


def plan(**changes: Any) -> Plan:
    resolved = resolve({**RECIPE, **changes})
    return Plan(resolved=resolved, stages=[stage.config for stage in stages_of(resolved)])


def stages(text: str, found: Plan | None = None, **settings: Any) -> list[Config]:
    (variant,) = parse_methods(text)
    recipe = (found or plan()).recipe(variant, settings, 3)
    return [stage.config for stage in stages_of(resolve(recipe))]


def test_methods_pipelines_settings_and_sweeps() -> None:
    found = parse_methods("sft, sft->grpo ,uniapl[objective.lambda_adv=0, optim.learning_rate=1e-5]")
    assert found == [
        Variant(methods=("sft",)),
        Variant(methods=("sft", "grpo")),
        Variant(methods=("uniapl",), settings={"objective.lambda_adv": 0, "optim.learning_rate": 1e-5}),
    ]
    labels = ["sft", "sft -> grpo", "uniapl[objective.lambda_adv=0, optim.learning_rate=1e-05]"]
    assert [variant.label for variant in found] == labels
    swept = parse_methods("grpo[objective.beta=0|0.5]")
    assert [variant.settings for variant in swept] == [{"objective.beta": 0}, {"objective.beta": 0.5}]
    assert {variant.swept for variant in swept} == {"objective.beta"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft,grop", "unknown method 'grop'.*Did you mean 'grpo'"),
        ("", "unknown method ''"),
        ("sft,", "unknown method ''"),
        ("sft -> ", "unknown method ''"),
        ("grpo[objective.beta=0", "no closing"),
        ("grpo[objective.beta]", "'objective.beta' of 'grpo' must be KEY=VALUE"),
        ("grpo[objective.beta=]", "must be KEY=VALUE"),
        ("grpo[model.lora_r=8]", "cannot change 'model.lora_r'"),
        ("uniapl[method=sft]", "cannot change 'method'"),
        ("uniapl[max_steps=50]", "cannot change 'max_steps'"),
        ("grpo[objective.beta=0|1, optim.learning_rate=1|2]", "sweep one of them"),
        ("sft,sft", "'sft' occurs more than once"),
        ("grpo[objective.beta=[1]]", "not a number or a word"),
    ],
)
def test_wrong_methods(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_methods(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("grpo[objective.bta=1]", "objective.bta"), ("uniapl[rollout.num_generations=1]", "num_generations")],
)
def test_settings_are_checked(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stages(text)


@pytest.mark.parametrize("method", [*METHODS, "sft -> grpo", "sft -> a-grpo", "a-sft -> a-grpo"])
def test_every_method_has_the_same_budget(method: str) -> None:
    budget = plan().budget
    assert (budget.rollouts, budget.demonstrations) == (5120, 1920)
    spent = budget_of(stages(method))
    if method in ("sft", "dpo"):
        assert (spent.rollouts, spent.demonstrations) == (0, 5120 + 1920)
        return
    assert spent.rollouts == 5120
    assert spent.demonstrations == (0 if method in ("grpo", "a-grpo", "gad", "opd") else 1920)


def test_the_recipe_s_own_method_is_the_recipe() -> None:
    (ours,) = stages("uniapl")
    expected = resolve({**RECIPE, "seed": 3, "output_dir": "runs/uniapl"}).config
    assert ours == expected


def test_the_recipe_s_own_pipeline_is_the_recipe() -> None:
    own = [
        {"method": "sft", "max_steps": 7, "optim": {"learning_rate": 5e-5}},
        {"method": "grpo", "max_steps": 9},
    ]
    found = plan(stages=own)
    first, second = stages("sft -> grpo", found)
    assert (first.max_steps, first.optim.learning_rate, second.max_steps) == (7, 5e-5, 9)
    first, second = stages("sft -> grpo[objective.beta=0.25]", found)
    assert second.objective.beta == 0.25
    # Another method has the pipeline's budget: 7 x 8 demonstrations and 9 x 64 rollouts.
    (chord,) = stages("chord-mu", found)
    assert (chord.max_steps, chord.batching.demonstrations_per_step) == (9, round(56 / 9))


def test_other_methods_share_what_does_not_describe_the_recipe_s_method() -> None:
    (chord,) = stages("chord-mu")
    assert (chord.objective.mu_peak, chord.objective.mu_valley) == (0.9, 0.05)
    assert chord.objective.mu_decay_steps == chord.max_steps == 80
    assert chord.objective.epsilon == 0.1
    assert chord.optim.learning_rate == 1e-4
    assert chord.data.columns == {"problem": "prompt"}
    (adversarial,) = stages("a-grpo")
    assert adversarial.objective.lambda_adv == Config().objective.lambda_adv
    (phi,) = stages("chord-phi[objective.mu_valley=0.3]")
    assert (phi.objective.mu_peak, phi.objective.mu_valley) == (0.3, 0.3)
    first, last = stages("sft -> uniapl")
    assert first.objective.mu_valley == 1
    assert last.objective.mu_valley == 0.3


def test_the_teacher_and_the_pairs_of_the_recipe_s_method_are_not_shared() -> None:
    own = plan(objective={"teacher_kl": 0.5, "pref_weight": 0.3, "beta_pref": 0.2})
    for method in ("grpo", "gad"):
        (other,) = stages(method, own)
        assert (other.objective.teacher_kl, other.objective.pref_weight) == (0, 0)
    (same,) = stages("uniapl", own)
    assert (same.objective.teacher_kl, same.objective.pref_weight) == (0.5, 0.3)


def test_the_reference_of_the_recipe_s_own_schedule_is_not_shared() -> None:
    own = plan(objective={"beta": 0.2, "reference_step": 25}, batching={"cold_start_steps": 25})
    (grpo,) = stages("grpo", own)
    assert (grpo.objective.beta, grpo.reference_step, grpo.cold_start_steps) == (0.2, 0, 0)


def test_a_fraction_of_the_demonstrations() -> None:
    (half,) = stages("sft[demonstrations=0.5]")
    assert half.max_steps * half.batching.demonstrations_per_step == (5120 + 1920) // 2


def test_epochs_become_steps() -> None:
    resolved = resolve({**RECIPE, "num_train_epochs": 2})
    (config,) = [stage.config for stage in stages_of(resolved)]
    found = Plan(resolved=resolved, stages=[config.model_copy(update={"max_steps": 50})])
    (ours,) = stages("uniapl", found)
    assert (ours.max_steps, ours.num_train_epochs) == (50, None)


def test_cells_have_unique_names() -> None:
    found = plan()
    cells = [
        found.cell(v, seed) for v in parse_methods("sft,grpo,grpo[objective.beta=0|0.1]") for seed in (0, 1)
    ]
    cells += [found.cell(parse_methods("grpo")[0], 0, {"objective.beta": 0.1})]
    assert len({cell.name for cell in cells}) == len(cells) == 9
    again = [plan().cell(v, 0) for v in parse_methods("sft")]
    assert again[0].name == cells[0].name, "the same recipe gives the same name"
    assert plan(max_steps=50).cell(parse_methods("sft")[0], 0).name != cells[0].name


def test_cells_of_the_search() -> None:
    found = plan()
    (grpo,) = parse_methods("grpo")
    assert found.rates == [3.3e-5, 1e-4, 3e-4]
    cells = found.search_cells(grpo, found.rates)
    assert all(cell.search and cell.seed == SEARCH_SEED for cell in cells)
    assert [cell.settings["optim.learning_rate"] for cell in cells] == found.rates
    assert {cell.settings["objective.beta"] for cell in cells} == {0.0}
    cells = found.search_cells(grpo, [1e-4], grpo.knob[1])
    assert [cell.recipe["objective"]["beta"] for cell in cells] == [0.0, 0.02, 0.1, 0.5]
    # A setting that is given is not searched.
    (fixed,) = parse_methods("grpo[objective.beta=0.5]")
    assert [cell.settings["objective.beta"] for cell in found.search_cells(fixed, [1e-4])] == [0.5]


def test_replaced_rollouts_count_in_the_budget() -> None:
    """Every stage that may replace rollouts ends when it has sampled its part; the others have no limit."""
    key = "rollout.max_resample_times"
    (own,) = stages(f"uniapl[{key}=3]")
    (grpo,) = stages(f"grpo[{key}=3]")
    # 80 of 100 steps with 64 rollouts.
    assert [one.early_stopping.max_rollouts for one in (own, grpo)] == [5120, 5120]
    assert (own.max_steps, own.cold_start_steps, grpo.max_steps) == (100, 20, 80)
    limits = [one.early_stopping.max_rollouts for one in stages(f"sft -> grpo -> grpo[{key}=3]")]
    assert limits == [None, 2560, 2560]
    pipeline = plan(stages=[{"method": "sft"}, {"method": "grpo"}])
    assert [one.early_stopping.max_rollouts for one in stages(f"sft->grpo[{key}=1]", pipeline)] == [
        None,
        6400,
    ]
    assert stages("grpo")[0].early_stopping.max_rollouts is None
    stopped = plan(early_stopping={"max_rollouts": 100})
    assert stages(f"grpo[{key}=3]", stopped)[0].early_stopping.max_rollouts == 100


def test_which_completions_pass_is_the_recipe_s_for_every_method() -> None:
    """Pass rates depend on it, whichever method uses them."""
    found = plan(objective={**RECIPE["objective"], "pass_threshold": 0.5})
    assert stages("grpo", found)[0].objective.pass_threshold == 0.5
