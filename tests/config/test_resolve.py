"""Recipes, flags and methods are merged into one configuration; errors name the key and the remedy."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from uniapl.config import Config
from uniapl.config.methods import METHODS
from uniapl.config.resolve import flatten, load_recipe, resolve, stages_of
from uniapl.errors import UsageError


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"max_step": 3}, r"unknown key 'max_step'; did you mean 'max_steps'\?"),
        (
            {"objective": {"lamda_adv": 3}},
            r"unknown key 'objective.lamda_adv'; did you mean 'objective.lambda_adv'",
        ),
        ({"learning_rate": 1.0}, r"unknown key 'learning_rate'; did you mean 'optim.learning_rate'"),
        ({"group_size": 4}, r"did you mean 'rollout.num_generations'"),
        ({"model": {"lora_rank": 8}}, r"did you mean 'model.lora_r'"),
        ({"rollout": {"n_samples_per_prompt": 4}}, r"did you mean 'rollout.num_generations'"),
        ({"zzz": 1}, r"unknown key 'zzz'; `uniapl train --help-all` lists all keys"),
        ({"max_steps": 0}, r"max_steps: .*greater than or equal to 1 \(got 0\)"),
        ({"max_steps": "many"}, r"max_steps: .*integer.*\(got 'many'\)"),
        ({"rollout": {"temperature": 0}}, r"rollout.temperature"),
        ({"objective": {"mu_peak": 1.5}}, r"objective.mu_peak"),
        ({"discriminator": {"accuracy_band": [0.9, 0.1]}}, r"discriminator.accuracy_band: .*low <= high"),
        ({"objective": {"lambda_bounds": [3, 1]}}, r"objective.lambda_bounds: .*low <= high"),
        (
            {"objective": {"lambda_gains": [1, -1, 0]}},
            r"objective.lambda_gains.1: .*greater than or equal to 0",
        ),
        (
            {"objective": {"lambda_controller": "pid", "lambda_adv": 50}},
            r"objective: .*must be within lambda_bounds, 0.05 to 20",
        ),
        (
            {"method": "chord-phi", "objective": {"mu_controller": "reward"}},
            r"objective: .*'reward' needs mu_valley below mu_peak",
        ),
        ({"method": "GRPO"}, r"unknown method 'GRPO': .*Did you mean 'grpo'\?"),
        ({"method": "ppo"}, r"unknown method 'ppo': choose one of sft, a-sft"),
        ({"rewards": {"functions": [{"weight": 1}]}}, r"rewards.functions.0.name: .*required"),
        ({"stages": [{"max_steps": 3}]}, "stage 1 needs a method"),
        ({"stages": [{"method": "sft", "model": {}}]}, "stage 1 cannot change 'model', only method"),
        ({"stages": [{"method": "sft", "max_step": 3}]}, "stage 1: unknown key 'max_step'; did you mean"),
        (
            {"stages": [{"method": "sft", "optim": {"lr": 1}}]},
            "stage 1: unknown key 'optim.lr'; did you mean",
        ),
    ],
)
def test_mistakes_are_named_with_a_suggestion(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stages_of(resolve(recipe))


def test_precedence_and_sources() -> None:
    recipe = {"method": "chord-mu", "max_steps": 5, "objective": {"mu_valley": 0.2}}
    resolved = resolve(recipe, ["--max-steps", "7", "--optim.learning_rate", "0.1", "--seed=3"])
    config, sources = resolved.config, resolved.sources
    assert (config.max_steps, sources["max_steps"]) == (7, "flag")
    assert (config.optim.learning_rate, sources["optim.learning_rate"]) == (0.1, "flag")
    assert (config.seed, sources["seed"]) == (3, "flag")
    assert (config.objective.mu_valley, sources["objective.mu_valley"]) == (0.2, "recipe")
    assert (config.objective.mu_peak, sources["objective.mu_peak"]) == (0.9, "method")
    assert (config.objective.lambda_adv, sources["objective.lambda_adv"]) == (0.0, "method")
    assert (config.objective.beta, sources["objective.beta"]) == (0.0, "default")


def test_a_method_on_the_command_line_is_that_method() -> None:
    """A recipe tuned for uniapl, run as grpo, has neither demonstrations nor adversary; the user is told."""
    resolved = resolve({"method": "uniapl", "objective": {"lambda_adv": 0.3}}, ["--method", "grpo"])
    assert resolved.config.objective.lambda_adv == 0
    assert not resolved.config.objective.learns_from_demonstrations
    assert resolved.notes == ("method 'grpo' sets objective.lambda_adv = 0.0 (recipe: 0.3)",)
    assert resolve({}, ["--method=sft"]).config.method == "sft"


@pytest.mark.parametrize(
    ("method", "demonstrations", "rewards", "adversary", "rollouts"),
    [
        ("sft", True, False, False, False),
        ("a-sft", True, False, True, True),
        ("grpo", False, True, False, True),
        ("a-grpo", False, True, True, True),
        ("chord-mu", True, True, False, True),
        ("chord-phi", True, True, False, True),
        ("uniapl", True, True, True, True),
        ("gad", False, False, True, True),
    ],
)
def test_methods_are_settings(
    method: str, demonstrations: bool, rewards: bool, adversary: bool, rollouts: bool
) -> None:
    """The table of methods in the documentation, read off the configuration."""
    objective = resolve({"method": method}).config.objective
    assert objective.learns_from_demonstrations == demonstrations
    assert objective.learns_from_rewards == rewards
    assert (objective.lambda_adv > 0) == adversary
    assert objective.uses_rollouts == rollouts
    assert (objective.sft_token_weight == "phi") == (method == "chord-phi")


def test_a_resolved_configuration_resolves_to_itself() -> None:
    for method in METHODS:
        config = resolve({"method": method}).config
        assert resolve(config.model_dump()).config == config


@pytest.mark.parametrize("source", ["recipe", "flag"])
def test_the_run_s_method_removes_no_setting_of_its_stages(source: str) -> None:
    """grpo has no adversary, but its stages may."""
    recipe: dict[str, Any] = {"method": "grpo", "stages": [{"method": "uniapl"}, {"method": "sft"}]}
    given = {"objective.lambda_adv": 2.0, "objective.mu_peak": 0.75}
    flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    resolved = resolve(recipe | given) if source == "recipe" else resolve(recipe, flags)
    uniapl, sft = stages_of(resolved)
    assert (uniapl.config.objective.lambda_adv, uniapl.config.objective.mu_peak) == (2.0, 0.75)
    assert uniapl.config.objective.mu_valley == 0.1, "uniapl's own, not grpo's"
    assert (sft.config.objective.lambda_adv, sft.config.objective.mu_peak) == (0.0, 1.0)
    assert "method 'sft' sets objective.lambda_adv = 0.0 (recipe: 2.0)" in sft.notes
    assert resolved.notes == ()


def test_stages_keep_what_the_recipe_says_and_take_their_method_s_values() -> None:
    recipe = {
        "objective": {"epsilon": 0.3, "lambda_adv": 0.7},
        "optim": {"learning_rate": 0.5},
        "stages": [
            {"method": "sft", "max_steps": 2},
            {"method": "a-grpo", "max_steps": 3, "optim": {"learning_rate": 0.1}},
            {"method": "chord-mu"},
        ],
    }
    sft, a_grpo, chord = (stage.config for stage in stages_of(resolve(recipe)))
    assert (sft.max_steps, sft.objective.mu_valley, sft.objective.lambda_adv) == (2, 1.0, 0.0)
    assert (a_grpo.max_steps, a_grpo.objective.mu_valley, a_grpo.objective.lambda_adv) == (3, 0.0, 0.7)
    assert (sft.optim.learning_rate, a_grpo.optim.learning_rate) == (0.5, 0.1)
    assert (chord.objective.mu_peak, chord.objective.epsilon, chord.max_steps) == (0.9, 0.3, 100)


def test_a_key_may_be_written_with_its_section() -> None:
    dotted = {
        "discriminator.lora_r": 8,
        "discriminator": {"replay_size": 4},
        "data.columns": {"q": "prompt"},
    }
    resolved = resolve(dotted)
    config = resolved.config
    assert (config.discriminator.lora_r, config.discriminator.replay_size) == (8, 4)
    assert config.data.columns == {"q": "prompt"}
    assert resolved.sources["discriminator.lora_r"] == "recipe"
    with pytest.raises(UsageError, match=r"unknown key 'discriminator\.lora_rnk'; did you mean"):
        resolve({"discriminator.lora_rnk": 8})


def test_a_component_that_cannot_act_within_the_run_is_noted() -> None:
    assert resolve({"max_steps": 10, "method": "grpo"}).notes == ()
    warmup = {
        "optim.warmup_steps": 10,
        "objective.mu_warmup_steps": 12,
        "max_steps": 10,
        "method": "chord-mu",
    }
    assert resolve(warmup).notes == (
        "the learning rate never reaches its value: optim.warmup_steps 10 is not below max_steps 10",
        "mu never reaches mu_peak: objective.mu_warmup_steps 12 is not below max_steps 10",
    )
    assert resolve(warmup | {"max_steps": 13}).notes == ()


COLD, HALF = "batching.cold_start_steps", "batching.cold_start_steps 0.5 (5 steps)"
COPY, HEAD, LIKELIHOOD = (
    {"discriminator.kind": kind} for kind in ("bradley-terry", "head", "reference-likelihood")
)
SAMPLED = {"batching.cold_start_prompts_per_step": 1}
WARMUP, REFERENCE = "discriminator.warmup_steps", "objective.reference_step"
NEVER = "the adversary is never used"


@pytest.mark.parametrize(
    ("values", "notes"),
    [
        (COPY | {WARMUP: 4, COLD: 0.5}, []),
        (COPY | {WARMUP: 5, COLD: 0.5}, [f"{NEVER}: {HALF} plus {WARMUP} 5"]),
        (COPY | {WARMUP: 10, COLD: 0}, [f"{NEVER}: {WARMUP} 10"]),
        (COPY | {WARMUP: 5, COLD: 0.5} | SAMPLED, []),
        (HEAD | {WARMUP: 4, COLD: 5}, []),
        (HEAD | {WARMUP: 5, COLD: 5}, [f"{NEVER}: {COLD} 5 plus {WARMUP} 5"]),
        (HEAD | {WARMUP: 5, COLD: 0.5} | SAMPLED, [f"{NEVER}: {HALF} plus {WARMUP} 5"]),
        (HEAD | {WARMUP: 3, COLD: 2, REFERENCE: 6}, []),
        (HEAD | {WARMUP: 4, COLD: 2, REFERENCE: 6}, [f"{NEVER}: {REFERENCE} 6 plus {WARMUP} 4"]),
        (HEAD | {WARMUP: 8, COLD: 2, REFERENCE: 0}, [f"{NEVER}: {COLD} 2 plus {WARMUP} 8"]),
        (LIKELIHOOD | {WARMUP: 50, COLD: 9}, []),
        (LIKELIHOOD | {COLD: 10}, [f"no rollouts are sampled: {COLD} 10"]),
        (LIKELIHOOD | {COLD: 0.99}, [f"no rollouts are sampled: {COLD} 0.99 (10 steps)"]),
        (
            LIKELIHOOD | {COLD: 0.1, REFERENCE: 10},
            [f"the KL is never used: {REFERENCE} 10", f"{NEVER}: {REFERENCE} 10"],
        ),
        (LIKELIHOOD | {COLD: 10} | SAMPLED, [f"the KL is never used: {COLD} 10", f"{NEVER}: {COLD} 10"]),
        (COPY | {COLD: 12, "method": "sft"}, []),
    ],
)
def test_notes_name_what_takes_all_steps(values: dict[str, Any], notes: list[str]) -> None:
    found = resolve(values | {"max_steps": 10}).notes
    assert found == tuple(f"{note} is not below max_steps 10" for note in notes)


def test_a_cold_start_without_a_step_is_noted() -> None:
    note = "there is no cold start: batching.cold_start_steps 0.2 of max_steps 2 is rounded to 0 steps"
    assert resolve(LIKELIHOOD | {"max_steps": 2}).notes == (note,)
    assert resolve(LIKELIHOOD | {"max_steps": 3}).notes == ()


def test_reward_functions_may_be_names() -> None:
    functions = resolve(
        {"rewards": {"functions": ["no_comma", {"name": "x", "weight": 2}]}}
    ).config.rewards.functions
    assert [(f.name, f.weight) for f in functions] == [("no_comma", 1.0), ("x", 2.0)]


def test_arguments_of_reward_functions_may_be_lists_and_mappings() -> None:
    args = {"schema": {"type": ["object"], "required": []}, "n": 1, "x": 0.5, "on": True, "off": None}
    [function] = resolve({"rewards": {"functions": [{"name": "x", "args": args}]}}).config.rewards.functions
    assert function.args == args
    assert [type(v) for v in function.args.values()][1:] == [
        int,
        float,
        bool,
        type(None),
    ]


def test_synonyms_of_other_libraries_as_flags() -> None:
    with pytest.raises(
        UsageError, match=r"unknown flag '--group-size'; did you mean '--rollout.num-generations'"
    ):
        resolve({}, ["--group-size", "4"])


def test_an_unknown_flag_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"unknown flag '--max-stps'; did you mean '--max-steps'"):
        resolve({}, ["--max-stps", "4"])


OLD_KEYS = {
    "gradient_steps": "log_gradients_steps",
    "completion_steps": "log_completions_steps",
    "discriminator.lora_rank": "discriminator.lora_r",
    "discriminator.freeze_step": "discriminator.freeze_after_steps",
    "discriminator.held_out_share": "discriminator.held_out_fraction",
    "discriminator.replay_share": "discriminator.replay_fraction",
    "discriminator.reads_example": "discriminator.in_context_demonstration",
    "discriminator.against": "discriminator.density_ratio_reference",
    "data.string_prompts": "data.prompt_format",
    "rollout.one_step_off": "rollout.max_off_policy_steps (1 for true, 0 for false)",
    "rollout.max_rows": "rollout.max_batch_size",
    "objective.adversarial_assignment": "objective.adversarial_credit",
    "objective.gate_reward": "objective.gate_threshold",
    "batching.max_tokens": "batching.max_tokens_per_micro_batch",
    "health.max_accuracy": "health.max_discriminator_accuracy",
    "health.max_zero_std": "health.max_frac_reward_zero_std",
    "stop": "early_stopping",
}
NAMES_IN_OTHER_LIBRARIES = {
    "batch_size": "batching.prompts_per_step",
    "clip_range": "objective.epsilon",
    "dataset_name": "data.path",
    "epsilon_low": "objective.epsilon",
    "group_size": "rollout.num_generations",
    "kl_coef": "objective.beta",
    "lambda": "objective.lambda_adv",
    "lora_rank": "model.lora_r",
    "lr": "optim.learning_rate",
    "max_new_tokens": "rollout.max_completion_length",
    "max_tokens": "rollout.max_completion_length",
    "mu": "objective.mu_peak",
    "n_samples_per_prompt": "rollout.num_generations",
    "num_steps": "max_steps",
    "repeat_times": "rollout.num_generations",
    "resume_from_checkpoint": "resume",
    "reward_funcs": "rewards.functions",
    "train_batch_size": "batching.prompts_per_step",
    "train_dataset": "data.path",
    "use_vllm": "rollout.sampler",
    "vllm_importance_sampling_cap": "rollout.vllm_importance_sampling_clip_max",
    "vllm_server_timeout": "rollout.vllm_timeout",
}


@pytest.mark.parametrize(("old", "new"), (OLD_KEYS | NAMES_IN_OTHER_LIBRARIES).items())
def test_an_old_or_foreign_name_is_refused_with_the_key(old: str, new: str) -> None:
    """In a recipe, with its section or dotted, and as a flag."""
    assert new.split()[0] in {*flatten(Config()), *Config.model_fields}
    section, _, leaf = old.rpartition(".")
    expected = re.escape(f"'{old}'; did you mean '{new}'?")
    for recipe in ({section: {leaf: 1}} if section else {old: 1}, {old: True}):
        with pytest.raises(UsageError, match=f"unknown key {expected}"):
            resolve(recipe)
    key, *explanation = new.split(" ", 1)
    meant = " ".join([f"did you mean '--{key.replace('_', '-')}", *explanation])
    meant = "did you mean the flags '--early-stopping.*" if old == "stop" else meant
    with pytest.raises(UsageError, match=re.escape(f"unknown flag '--{old}'; {meant}'?")):
        resolve({}, [f"--{old}", "1"])


@pytest.mark.parametrize(("old", "new"), OLD_KEYS.items())
def test_an_old_key_inside_a_stage_is_refused_with_the_new_one(old: str, new: str) -> None:
    recipe = {"stages": [{"method": "sft", old: 1}]}
    message = f"stage 1: unknown key '{old}'; did you mean '{new}'?"
    if old.startswith("data."):
        message = f"stage 1 cannot change '{old}'"
    with pytest.raises(UsageError, match=re.escape(message)):
        stages_of(resolve(recipe))


@pytest.mark.parametrize("key", ["metric", "greater_is_better", "target", "patience", "max_tokens"])
def test_a_flag_of_the_old_section_stop_is_refused_with_the_new_one(key: str) -> None:
    with pytest.raises(
        UsageError, match=f"'--stop.{key}'; did you mean '--early-stopping.{key.replace('_', '-')}'"
    ):
        resolve({}, [f"--stop.{key}", "1"])


def test_a_closed_pipe_prints_no_traceback() -> None:
    """As `uniapl train --help | head` does."""
    command = [sys.executable, "-m", "uniapl.cli", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert "BrokenPipe" not in process.stderr.read()


def test_help_shows_the_recipe_s_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        resolve({"max_steps": 4321}, ["--help"])
    assert exit_.value.code == 0
    assert "4321" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "not valid YAML"),
        (b"optim: {a: 1}\nseed: 3\noptim: {b: 2}", "duplicate key 'optim'"),
        (b"optim:\n  a: 1\n  a: 2", "duplicate key 'a'"),
        (b"stages: &a [*a]", "not valid YAML: found unconstructable recursive node"),
        (b"&a {optim: *a}", "not valid YAML: found unconstructable recursive node"),
        (b"- a", "must be a mapping"),
        (b"\xff\xfe\xfa", "cannot read"),
        (b"", "mapping"),
    ],
)
def test_bad_recipes(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_recipe(path)


def test_a_missing_recipe_is_named() -> None:
    with pytest.raises(UsageError, match=r"cannot read the recipe 'nowhere.yaml'"):
        load_recipe("nowhere.yaml")


def test_a_missing_recipe_is_named_with_the_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("method: sft")
    with pytest.raises(UsageError, match=r"base.yml': file not found. Did you mean '.*base.yaml'\?"):
        load_recipe(tmp_path / "base.yml")


def test_every_key_is_described() -> None:
    """`--help-all` is the reference, so that every key needs a description."""
    for section in Config().model_fields_set | set(Config.model_fields):
        annotation = Config.model_fields[section].annotation
        fields = getattr(annotation, "model_fields", {section: Config.model_fields[section]})
        for name, field in fields.items():
            assert field.description, f"{section}.{name}"


def test_shipped_recipes_resolve() -> None:
    recipes = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
    recipes = [path for path in recipes if path.parent.name != "accelerate"]
    assert recipes
    for path in recipes:
        assert stages_of(resolve(load_recipe(path)))
        assert set(flatten(yaml.safe_load(path.read_text())))


def test_aliases_of_aliases_give_a_short_error(tmp_path: Path) -> None:
    """Written out, the value would have 10 ** 12 items."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "recipe.yaml").write_text("\n".join([*lines, "max_steps: *a11"]))
    with pytest.raises(UsageError) as raised:
        resolve(load_recipe(tmp_path / "recipe.yaml"))
    assert "max_steps" in str(raised.value)
    assert len(str(raised.value)) < 3000


def test_the_learning_rate_of_a_new_head_is_higher_than_that_of_a_copy() -> None:
    rates = {
        kind: resolve({"discriminator": {"kind": kind}}).config.discriminator.trained_learning_rate
        for kind in ("head", "bradley-terry")
    }
    assert rates == {"head": 1e-3, "bradley-terry": 1e-5}
    given = resolve({"discriminator": {"kind": "head", "learning_rate": 3e-4}}).config.discriminator
    assert given.trained_learning_rate == 3e-4


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            {"loss_type": "cispo", "epsilon_high": 0.28},
            "epsilon_high is the largest ratio itself and must be at least 1, not 0.28; null uses 5",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
            "'normalize_then_sum' divides by the deviations of the group and of the step: remove",
        ),
        ({"loss_type": "luspo"}, "objective.loss_type"),
        ({"entropy_coef": -0.1}, "objective.entropy_coef"),
    ],
)
def test_a_loss_that_contradicts_itself_is_refused(objective: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        resolve({"method": "grpo", "objective": objective})


@pytest.mark.parametrize(("given", "value"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_scale_rewards_takes_trl_s_values(given: Any, value: str) -> None:
    assert resolve({"objective": {"scale_rewards": given}}).config.objective.scale_rewards == value


def test_the_largest_ratio_of_cispo_is_not_the_clip_width() -> None:
    def clip_high(**objective: Any) -> float:
        return resolve({"objective": objective}).config.objective.clip_high

    assert clip_high(loss_type="cispo") == 5.0
    assert clip_high(loss_type="cispo", epsilon_high=1.0) == 1.0
    assert clip_high(loss_type="grpo") == 0.2


def test_sft_has_no_entropy_bonus_for_which_it_would_sample() -> None:
    resolved = resolve({"method": "sft", "objective": {"entropy_coef": 0.1}})
    assert not resolved.config.objective.uses_rollouts
    assert any("objective.entropy_coef = 0.0" in note for note in resolved.notes)
    assert (
        resolve({"method": "grpo", "objective": {"entropy_coef": 0.1}}).config.objective.entropy_coef == 0.1
    )
