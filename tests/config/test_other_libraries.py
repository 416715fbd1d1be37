"""Every key of TRL and transformers, and common keys of others, leads to a key or to a reason."""

import dataclasses

import pytest
import transformers
import trl

from uniapl import cli
from uniapl.config import Config
from uniapl.config.other_libraries import NO_EQUIVALENT, OTHER_NAMES
from uniapl.config.resolve import flatten, resolve
from uniapl.config.suggestions import suggestion
from uniapl.errors import UsageError

KEYS = {*flatten(Config()), *Config.model_fields}
LEAVES = {key.rsplit(".", 1)[-1] for key in KEYS}
NAMES = ("GRPOConfig", "SFTConfig", "DPOConfig", "ModelConfig", "ScriptArguments")
CLASSES = (*(getattr(trl, name) for name in NAMES), transformers.TrainingArguments)
FIELDS = sorted({field.name for one in CLASSES for field in dataclasses.fields(one)})
LATER = {"data.name", "data.revision"}
"""Keys that the tables may name before the configuration has them."""


def test_there_are_as_many_fields_as_expected() -> None:
    assert len(FIELDS) > 200


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_trl_and_transformers_has_a_key_or_a_reason(name: str) -> None:
    assert name in LEAVES | OTHER_NAMES.keys() | NO_EQUIVALENT.keys()
    if name in KEYS:
        return
    said = suggestion(name)
    assert said.startswith(("; did you mean '", "; it has no equivalent: "))
    with pytest.raises(UsageError) as raised:
        resolve({name: 1})
    assert f"unknown key '{name}'{said}" in str(raised.value)


def test_every_suggested_key_exists() -> None:
    assert {value.split(" ")[0] for value in OTHER_NAMES.values()} <= KEYS | LATER
    assert not OTHER_NAMES.keys() & NO_EQUIVALENT.keys()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gradient_accumulation_steps", "did you mean 'batching.prompts_per_step (all prompts of a step"),
        ("assistant_only_loss", "did you mean 'data.train_on (last or all)'?"),
        ("warmup_ratio", "did you mean 'optim.warmup_ratio'?"),
        ("loss_type", "did you mean 'objective.loss_type'?"),
        ("delta", "it has no equivalent: the rollouts' loss is one of objective.loss_type"),
        ("entropy_coeff", "did you mean 'objective.entropy_coef'?"),
        ("use_peft", "did you mean 'model.lora_r'?"),
        ("push_to_hub", "it has no equivalent: after training, `uniapl export OUTPUT_DIR --push-to-hub USER"),
        ("hub_token", "it has no equivalent: `hf auth login` or the environment variable HF_TOKEN"),
        ("wandb_group", "did you mean 'run_group'?"),
        ("early_stopping_patience", "did you mean 'early_stopping.patience'?"),
        ("eval_dataset", "did you mean 'evaluation.suites'?"),
        ("save_strategy", "did you mean 'save_steps'?"),
        ("experiment_name", "did you mean 'run_name'?"),
        ("deepspeed", "it has no equivalent: processes and FSDP2 are set by `accelerate launch"),
        ("max_length", "did you mean 'data.max_demonstration_length (longer rows are left out"),
        ("max_prompt_length", "did you mean 'data.max_prompt_length'?"),
        ("beta", "did you mean 'objective.beta'?"),
        ("pref_beta", "did you mean 'objective.beta_pref'?"),  # LLaMA-Factory
        ("ld_alpha", "it has no equivalent: the loss on preference pairs is DPO's with a sigmoid"),
        ("base_model", "did you mean 'model.model_name_or_path'?"),  # Axolotl
        ("micro_batch_size", "did you mean 'batching.per_device_train_batch_size'?"),
        ("sequence_len", "did you mean 'data.max_demonstration_length"),
        ("num_epochs", "did you mean 'num_train_epochs'?"),
        ("rlhf_type", "did you mean 'method'?"),  # ms-swift
        ("soft_cache_length", "did you mean 'rewards.functions (get_soft_overlong_punishment)'?"),
        ("overlong_buffer", "did you mean 'rewards.functions (get_soft_overlong_punishment)'?"),  # verl
        ("train_type", "did you mean 'model.lora_r'?"),
        ("chord_mu_peak", "did you mean 'objective.mu_peak'?"),
        ("attn_impl", "did you mean 'model.attn_implementation'?"),
        ("min_p", "did you mean 'rollout.min_p'?"),
        ("top_p", "did you mean 'rollout.top_p'?"),
        ("repetition_penalty", "did you mean 'rollout.repetition_penalty'?"),
        ("chat_template_path", "did you mean 'model.chat_template_path'?"),
        ("eos_token", "did you mean 'model.stop_tokens (tokens as text"),
        ("stop_words", "did you mean 'rollout.stop_strings'?"),
        ("generation_kwargs", "it has no equivalent: rollout and evaluation have temperature, "),
    ],
)
def test_common_keys(name: str, said: str) -> None:
    for key in (name, f"training.{name}"):
        assert suggestion(key).startswith(f"; {said}")


@pytest.mark.parametrize(
    ("verb", "hint"),
    [
        ("trian", "did you mean 'train'?"),
        ("Train", "did you mean 'train'?"),
        ("chek", "did you mean 'check'?"),
        ("pretrain_discriminator", "did you mean 'pretrain-discriminator'?"),
        ("eval", "did you mean 'evaluate'?"),
        ("sft", "did you mean 'train'?"),
        ("trl.yaml", "did you mean 'uniapl train trl.yaml'?"),
        ("xyzzy", "choose one of demo, init, recipes, compare, train"),
    ],
)
def test_a_misspelt_verb(verb: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([verb, "recipe.yaml"]) == 2
    assert capsys.readouterr().err.startswith(f"error: unknown verb '{verb}'; {hint}")
