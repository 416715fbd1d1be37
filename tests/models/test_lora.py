"""LoRA policies: their outputs, files, merged copies, and models that use the base without the adapter."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from support.adapters import IDS, complete_model, logits, policy_model, settings
from support.comparisons import sequences
from support.lora_trunk import on
from support.runs import write_recipe
from support.tiny import make_model, make_tokenizer, random_rows, save_model
from uniapl import UsageError, cli
from uniapl.config import ModelConfig
from uniapl.data.batching import collate
from uniapl.discriminator.bradley_terry import BradleyTerryDiscriminator, ScoreModel
from uniapl.models.loading import ModelSource, load_stop_ids
from uniapl.models.lora import (
    is_adapter,
    linear_layers,
    merge_in_place,
    merged,
    read_adapter,
    save_weights,
    without_adapter,
)
from uniapl.models.policy import Policy
from uniapl.models.reference import reference_at_start, trained_weights
from uniapl.training.update.activation_checkpointing import activation_checkpointing


def adapted(config: ModelConfig, *, scale: float = 0.3) -> PreTrainedModel:
    """A policy whose adapter changes the output."""
    model = policy_model(config, seed=0).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    return model


def batch_of(seed: int = 0) -> tuple[Tensor, ...]:
    batch = collate(random_rows(seed), pad_id=0, device=torch.device("cpu"))
    mask = batch.sft_mask | batch.rollout_mask
    return batch.input_ids, batch.attention_mask, batch.position_ids, mask, batch.temperature


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2_softcap"])
def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained(family: str, tmp_path: Path) -> None:
    path = save_model(tmp_path, family=family)
    model = policy_model(settings(path), seed=0).eval()
    assert_close(logits(model), logits(complete_model(settings(path)).eval()), atol=0.0, rtol=0.0)
    trained = trained_weights(model)
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    # The head has no adapter, because the policy uses its weight directly.
    assert not any("head" in name for name in trained)
    assert Policy(model).has_linear_head == Policy(complete_model(settings(path))).has_linear_head


def test_it_is_drawn_from_its_seed_alone(model_dir: Path) -> None:
    torch.manual_seed(1)
    one = trained_weights(policy_model(settings(model_dir), seed=5))
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    two = trained_weights(policy_model(settings(model_dir), seed=5))
    other = trained_weights(policy_model(settings(model_dir), seed=6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("alpha", "expected"), [(None, 2.0), (4, 1.0), (16, 4.0)])
def test_the_change_is_alpha_by_r_times_b_a(model_dir: Path, alpha: int | None, expected: float) -> None:
    """By hand, on one layer's weight."""
    targets = {"lora_target_modules": "q_proj", "lora_alpha": alpha}
    model = adapted(settings(model_dir, **targets))
    trained = trained_weights(model)
    assert all(".q_proj." in name for name in trained)
    assert len(trained) == 2 * 2
    plain = complete_model(settings(model_dir)).eval()
    stem = "model.layers.{}.self_attn.q_proj"
    with torch.no_grad():
        for number in range(2):
            down, up = (trained[f"{stem.format(number)}.lora_{part}.default.weight"] for part in "AB")
            plain.get_parameter(f"{stem.format(number)}.weight").add_(expected * up @ down)
    assert_close(logits(model), logits(plain), atol=1e-6, rtol=1e-5)


def test_peft_and_transformers_load_what_is_saved(model_dir: Path, tmp_path: Path) -> None:
    model = adapted(settings(model_dir, model_revision="main"))
    save_weights(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    assert_close(logits(PeftModel.from_pretrained(base, tmp_path).eval()), logits(model), atol=0.0, rtol=0.0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(logits(loaded), logits(model), atol=0.0, rtol=0.0)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(model_dir)
    assert (said["r"], said["lora_alpha"], said["lora_dropout"], said["revision"]) == (4, 8, 0.0, "main")
    assert said["target_modules"] == sorted(said["target_modules"]), "a set's order would differ between runs"


def test_loading_an_adapter_merges_it_and_training_goes_on_from_it(model_dir: Path, tmp_path: Path) -> None:
    model = adapted(settings(model_dir))
    save_weights(model, tmp_path)
    merged = complete_model(ModelConfig(model_name_or_path=str(tmp_path))).eval()
    assert not any("lora" in name for name in merged.state_dict())
    assert all(parameter.requires_grad for parameter in merged.parameters()), "or nothing could start from it"
    assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)
    for again in (
        policy_model(settings(tmp_path), seed=1),
        policy_model(settings(model_dir), tmp_path, seed=1),
    ):
        assert_close(logits(again.eval()), logits(model), atol=0.0, rtol=0.0)
        assert again.name_or_path == str(model_dir)


def test_what_ends_an_answer_is_the_base_s_to_say(model_dir: Path, tmp_path: Path) -> None:
    """For an adapter without a generation configuration, as PEFT saves it."""
    base = tmp_path / "base"
    save_model(base)
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    model = policy_model(settings(base), seed=0)
    (tmp_path / "adapter").mkdir()
    save_weights(model, tmp_path / "adapter")
    found = load_stop_ids(ModelSource.resolve(settings(tmp_path / "adapter")), model.config, make_tokenizer())
    assert found == {1, 9}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_r": 2}, "r 4 instead of 2; lora_alpha 8 instead of 4"),
        ({"lora_alpha": 4}, "lora_alpha 8 instead of 4"),
        ({"lora_target_modules": ["q_proj"]}, "28 matrices instead of 4, for other modules"),
    ],
)
def test_another_adapter_is_refused(
    changes: dict[str, Any], said: str, model_dir: Path, tmp_path: Path
) -> None:
    save_weights(policy_model(settings(model_dir), seed=0), tmp_path)
    with pytest.raises(UsageError, match=said) as refused:
        policy_model(settings(tmp_path, **changes), seed=0)
    assert f"uniapl export {tmp_path}" in str(refused.value)


def test_broken_adapters_are_named(model_dir: Path, tmp_path: Path) -> None:
    model = policy_model(settings(model_dir), seed=0)
    save_weights(model, tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    kept = config.read_text()
    config.write_text(kept.replace(str(model_dir), str(tmp_path / "gone")))
    gone = f"the base model '{tmp_path / 'gone'}' of the adapter '{tmp_path}' does not exist"
    with pytest.raises(UsageError, match=gone):
        complete_model(settings(tmp_path))
    for content, said in (("{", "settings"), ("[]", "expected a JSON object"), ("{}", "names no base model")):
        config.write_text(content)
        with pytest.raises(UsageError, match=said):
            complete_model(settings(tmp_path))
    config.write_text(kept)
    weights.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot read the adapter's weights"):
        complete_model(settings(tmp_path))
    weights.unlink()
    with pytest.raises(UsageError, match="cannot read the adapter's weights"):
        read_adapter(model, tmp_path)
    other = save_model(tmp_path / "other", family="gpt2")
    save_weights(model, tmp_path)
    config.write_text(kept.replace(str(model_dir), str(other)))
    with pytest.raises(UsageError, match="cannot load the adapter"):
        complete_model(settings(tmp_path))


def test_an_adapter_of_peft_s_own_making_is_merged(model_dir: Path, tmp_path: Path) -> None:
    """An adapter of another kind: DoRA, on some layers."""
    kind = LoraConfig(r=2, use_dora=True, target_modules=["v_proj", "up_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(complete_model(settings(model_dir)), kind).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    assert is_adapter(tmp_path)
    assert_close(logits(complete_model(settings(tmp_path)).eval()), logits(theirs), atol=1e-5, rtol=1e-5)


def test_modules_that_are_not_there_and_a_missing_rank_are_refused(model_dir: Path) -> None:
    with pytest.raises(UsageError, match="lora_target_modules: Qwen3ForCausalLM has no module 'wq', 'wk'"):
        policy_model(settings(model_dir, lora_target_modules=["wq", "wk"]), seed=0)
    with pytest.raises(ValueError, match="need lora_r, the rank"):
        settings(model_dir, lora_r=None, lora_alpha=8)


def test_without_peft(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_weights(policy_model(settings(model_dir), seed=0), tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(UsageError, match=r"pip install 'uniapl\[peft\]'"):
        complete_model(settings(tmp_path))
    assert cli.run(["check", str(write_recipe(tmp_path, model_dir)), "--model.lora-r", "4"]) == 2
    assert "pip install 'uniapl[peft]'" in capsys.readouterr().err


def test_the_base_is_read_without_the_adapter_and_the_adapter_goes_on(model_dir: Path) -> None:
    model = adapted(settings(model_dir))
    spoken, trained = logits(model), set(trained_weights(model))
    with without_adapter(model.base_model):
        assert_close(logits(model), logits(complete_model(settings(model_dir)).eval()), atol=0.0, rtol=0.0)
    assert_close(logits(model), spoken, atol=0.0, rtol=0.0)
    assert set(trained_weights(model)) == trained
    plain = complete_model(settings(model_dir)).base_model
    assert linear_layers(model.base_model).keys() == linear_layers(plain).keys()


def test_a_discriminator_of_adapters_reads_with_the_policy_s_base(model_dir: Path) -> None:
    """The tensors of its own adapters keep their names, and the policy's adapter gets no gradient."""
    model = adapted(settings(model_dir))
    subject, plainly = on(model, trained=True), on(complete_model(settings(model_dir)).eval(), trained=True)
    assert subject.module.state_dict().keys() == plainly.module.state_dict().keys()
    assert subject.logits(sequences()) == pytest.approx(plainly.logits(sequences()), abs=1e-6)
    before = logits(model)
    for losses in subject.losses([]):
        losses()["pairs"].backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in subject.module.parameters())
    assert_close(logits(model), before, atol=0.0, rtol=0.0)


def test_a_discriminator_that_is_a_copy_has_the_adapter_merged_and_learns_as_a_whole(model_dir: Path) -> None:
    model = adapted(settings(model_dir))
    module = ScoreModel.copy_of(model)
    assert all(parameter.requires_grad for parameter in module.parameters())
    plain = complete_model(settings(model_dir))
    assert trained_weights(module.trunk).keys() == trained_weights(plain.base_model).keys()
    merged = copy.deepcopy(model)
    merge_in_place(merged)
    assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)
    nn.init.ones_(module.head.weight)
    subject = BradleyTerryDiscriminator(module=module, pad_id=0, max_tokens=10_000)
    ids = sequences()[0]
    with torch.no_grad():
        hidden = merged.base_model(torch.tensor([ids[0] + ids[1]])).last_hidden_state[0, -1]
    assert subject.logits([ids]) == [pytest.approx(float(hidden.sum()), abs=1e-4)]


@pytest.mark.parametrize("lora_r", [4, None])
def test_the_reference_is_the_policy_as_it_was(lora_r: int | None, model_dir: Path, tmp_path: Path) -> None:
    """The reference does not change with the policy, is saved and loaded, and can copy the policy later."""
    config, inputs = settings(model_dir, lora_r=lora_r), batch_of()
    policy = Policy(policy_model(config, seed=0))
    at_start, _ = policy(*inputs)
    source = ModelSource.resolve(config)
    reference = reference_at_start(policy, source)
    assert torch.equal(reference(*inputs)[0], at_start)
    with torch.no_grad():
        for tensor in trained_weights(policy).values():
            tensor.add_(0.05)
    moved, _ = policy(*inputs)
    assert not torch.allclose(moved, at_start, atol=1e-3)
    assert torch.equal(reference(*inputs)[0], at_start)
    assert torch.equal(reference_at_start(policy, source)(*inputs)[0], at_start), "as at a resume"
    assert not reference(*inputs)[0].requires_grad
    reference.save(tmp_path / "reference.safetensors")
    reference.copy_policy()
    assert torch.equal(reference(*inputs)[0], moved)
    reference.load(tmp_path / "reference.safetensors")
    assert torch.equal(reference(*inputs)[0], at_start)
    kept = sum(tensor.nbytes for tensor in load_file(tmp_path / "reference.safetensors").values())
    assert kept == sum(tensor.nbytes for tensor in trained_weights(policy).values())


def test_the_reference_of_a_stage_is_the_adapter_it_started_from(model_dir: Path, tmp_path: Path) -> None:
    before = Policy(adapted(settings(model_dir)))
    save_weights(before.model, tmp_path)
    policy = Policy(policy_model(settings(model_dir), tmp_path, seed=0))
    with torch.no_grad():
        for tensor in trained_weights(policy).values():
            tensor.add_(0.05)
    for reference in (
        reference_at_start(policy, ModelSource.resolve(settings(model_dir)).with_weights(tmp_path)),
        reference_at_start(policy, ModelSource.resolve(settings(tmp_path))),
    ):
        assert torch.equal(reference(*batch_of())[0], before(*batch_of())[0])


@pytest.mark.parametrize("lora_r", [4, None])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_recomputed_layers_keep_less_and_give_the_same_gradient(
    family: str, lora_r: int | None, tmp_path: Path
) -> None:
    policy = Policy(policy_model(settings(save_model(tmp_path, family=family), lora_r=lora_r), seed=0))
    inputs = batch_of()

    def gradients(*, enabled: bool) -> tuple[dict[str, Tensor], int]:
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        policy.zero_grad()
        with activation_checkpointing(policy.model, enabled):
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                loss = policy(*inputs)[0].sum()
            forward = kept
            loss.backward()
        found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        return found, forward

    plain, much = gradients(enabled=False)
    again, little = gradients(enabled=True)
    assert plain.keys() == {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert little < 0.5 * much
    assert not any("forward" in vars(module) for module in policy.modules()), (
        "the wrapped forwards are removed"
    )


def test_a_model_whose_layers_cannot_be_recomputed_is_refused() -> None:
    with (
        pytest.raises(UsageError, match=r"optim.gradient_checkpointing: Linear does not support it"),
        activation_checkpointing(nn.Linear(2, 2), True),
    ):
        pass
    with activation_checkpointing(make_model("qwen3"), True) as nothing:
        assert nothing is None


def test_a_merged_copy_is_saved_as_a_whole_model(model_dir: Path, tmp_path: Path) -> None:
    """The copy, which vLLM receives, has the outputs of the adapted model, which is unchanged."""
    model = adapted(settings(model_dir))
    expected = model(IDS).logits
    merged(model).save_pretrained(tmp_path)
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected, atol=1e-5, rtol=1e-4)
    assert not is_adapter(tmp_path)
    assert_close(model(IDS).logits, expected, atol=0.0, rtol=0.0)
    plain = make_model()
    assert merged(plain) is plain
