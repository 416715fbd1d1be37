"""The policy's head, and models that cannot be trained."""

from pathlib import Path

import pytest
from transformers import Gemma2Config

import uniapl
from support.runs import recipe, train
from support.tiny import CONFIGS, make_model, save_model
from uniapl.models.policy import Policy


def test_a_soft_cap_is_found_although_a_fresh_model_s_logits_are_small() -> None:
    small = {**CONFIGS["gemma2_softcap"].to_dict(), "final_logit_softcapping": 30.0}
    from transformers import AutoModelForCausalLM

    assert not Policy(AutoModelForCausalLM.from_config(Gemma2Config(**small))).has_linear_head


def test_a_model_with_state_space_layers_is_refused_before_training(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Lfm2Config

    path = save_model(tmp_path / "model")
    small = {key: value for key, value in CONFIGS["qwen3"].to_dict().items() if key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "eos_token_id", "pad_token_id",
    )}  # fmt: skip
    hybrid = Lfm2Config(**small, layer_types=["conv", "full_attention"])
    AutoModelForCausalLM.from_config(hybrid).save_pretrained(path)
    with pytest.raises(uniapl.UsageError, match="layers without a key-value cache"):
        train(recipe(path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_model_s_head_is_checked_relative_to_its_logits() -> None:
    assert Policy(make_model("llama", scale=50.0)).has_linear_head
