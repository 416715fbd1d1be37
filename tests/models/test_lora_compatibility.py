"""Which adapters, also of PEFT's own making, fit a model, and the errors for those that do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from support.adapters import complete_model, logits, policy_model, settings
from support.runs import recipe, train, write_recipe
from support.tiny import make_tokenizer, save_model
from uniapl import UsageError, cli
from uniapl.config import ModelConfig
from uniapl.models.loading import ModelSource, check_policy, load_tokenizer
from uniapl.models.lora import save_weights
from uniapl.models.reference import trained_weights


def of_peft(model_dir: Path, path: Path, **changes: Any) -> Tensor:
    """Save an adapter with changed weights by PEFT only; return its logits."""
    kind: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model: Any = get_peft_model(complete_model(settings(model_dir)), LoraConfig(**kind | changes)).eval()
    learn(model)
    model.save_pretrained(path)
    return logits(model)


def source_of(path: Path) -> ModelSource:
    return ModelSource.resolve(settings(path))


def learn(model: nn.Module) -> None:
    """Change all trained weights."""
    torch.manual_seed(7)
    with torch.no_grad():
        for tensor in trained_weights(model).values():
            tensor.add_(0.2 * torch.randn_like(tensor))


def change_settings(path: Path, **changes: Any) -> None:
    """Change keys of an adapter's settings; None removes a key."""
    file = path / "adapter_config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_an_embedding_that_is_the_head_has_no_adapter(end: str, model_dir: Path, tmp_path: Path) -> None:
    """Merged into the shared weight it would act twice, but in training it acts once."""
    reason = rf"{end}.*the model's embedding and head are one weight"
    with pytest.raises(UsageError, match=f"model.lora_target_modules: remove .*{reason}"):
        policy_model(settings(model_dir, lora_target_modules=["q_proj", end]), seed=0)
    of_peft(model_dir, tmp_path / "theirs", target_modules=["q_proj", end])
    with pytest.raises(UsageError, match=f"cannot load the adapter '{tmp_path / 'theirs'}': .*{reason}"):
        complete_model(settings(tmp_path / "theirs"))
    # Untied weights may have adapters.
    untied = save_model(tmp_path / "untied", family="llama")
    model = policy_model(settings(untied, lora_target_modules=[end]), seed=0).eval()
    learn(model)
    (tmp_path / "ours").mkdir()
    save_weights(model, tmp_path / "ours")
    assert_close(
        logits(complete_model(settings(tmp_path / "ours")).eval()), logits(model), atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(logits(complete_model(settings(untied)).eval()), logits(model), atol=1e-2)


@pytest.mark.parametrize(
    "kind", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 6]}], ids=["head", "tokens"]
)
def test_what_peft_merges_rightly_into_tied_weights_is_merged(
    kind: dict[str, Any], model_dir: Path, tmp_path: Path
) -> None:
    expected = of_peft(model_dir, tmp_path, target_modules=["q_proj"], **kind)
    assert_close(logits(complete_model(settings(tmp_path)).eval()), expected, atol=1e-5, rtol=1e-5)


def test_the_base_s_revision_outlives_a_start_from_an_adapter(model_dir: Path, tmp_path: Path) -> None:
    save_weights(policy_model(settings(model_dir, model_revision="v1.0"), seed=0), tmp_path)
    (tmp_path / "again").mkdir()
    save_weights(policy_model(settings(tmp_path), seed=0), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["revision"] == "v1.0"


@pytest.mark.parametrize("rank", [1, 2])
def test_an_adapter_of_other_shapes_is_refused(rank: int, model_dir: Path, tmp_path: Path) -> None:
    """Without the check, rank 1 would be broadcast and any other rank would raise a traceback."""
    of_peft(model_dir, tmp_path, rank_pattern={"q_proj": rank})
    shapes = rf"q_proj.lora_B.weight is \[32, {rank}\] instead of \[32, 4\]"
    said = f"does not match model.lora_r.*another base model or rank: .*{shapes}.*uniapl export {tmp_path}"
    with pytest.raises(UsageError, match=said):
        policy_model(settings(tmp_path), seed=0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "base_model.model.",
            "module.base_model.model.",
            "28 of its tensors are missing .* and 28 in",
        ),
        ("layers.1.", "layers.9.", "14 of its tensors are missing from the file and 14 in the file"),
        ("lora_B", "lora_b", "14 of its tensors are missing from the file and 14 in the file"),
    ],
)
def test_an_adapter_whose_tensors_have_other_names_is_refused(
    old: str, new: str, message: str, model_dir: Path, tmp_path: Path
) -> None:
    """PEFT only warns, and the adapter would have no effect. `check` finds it from the base's headers."""
    of_peft(model_dir, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file)
    merging = ModelConfig(model_name_or_path=str(tmp_path))
    for load in (lambda: complete_model(merging), lambda: check_policy(source_of(tmp_path), merging)):
        with pytest.raises(UsageError, match=message):
            load()
    for load in (
        lambda: policy_model(settings(tmp_path)),
        lambda: check_policy(source_of(tmp_path), settings(tmp_path)),
    ):
        with pytest.raises(UsageError, match="28 matrices instead of 28, for other modules"):
            load()


def test_an_adapter_of_a_deeper_model_is_refused(model_dir: Path, tmp_path: Path) -> None:
    """Its layers are found by their ends, so that the first two fit."""
    of_peft(model_dir, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    deeper = {name.replace("layers.1.", "layers.2."): t.clone() for name, t in tensors.items()}
    save_file(deeper | tensors, file)
    with pytest.raises(UsageError, match=r"0 of its tensors are missing .* and 14 in the file .*layers\.2\."):
        complete_model(ModelConfig(model_name_or_path=str(tmp_path)))


@pytest.mark.filterwarnings("error:.*meta parameter")
def test_check_accepts_adapters_that_fit(model_dir: Path, tmp_path: Path) -> None:
    of_peft(model_dir, tmp_path)
    for config in (settings(tmp_path), ModelConfig(model_name_or_path=str(tmp_path))):
        check_policy(source_of(tmp_path), config)


def test_the_settings_that_an_older_peft_did_not_write_are_its_defaults(
    model_dir: Path, tmp_path: Path
) -> None:
    expected = of_peft(model_dir, tmp_path)
    change_settings(tmp_path, use_rslora=None, alpha_pattern=None, rank_pattern=None)
    assert_close(logits(policy_model(settings(tmp_path), seed=0).eval()), expected, atol=1e-6, rtol=1e-5)
    change_settings(tmp_path, use_rslora=True)
    with pytest.raises(UsageError, match="use_rslora True instead of False"):
        policy_model(settings(tmp_path), seed=0)


def test_every_name_has_a_module(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT ignores a name without a module if another name has one."""
    for names, missing in ((["q_proj", "vproj"], "vproj"), (["q_proj", ""], ""), (["proj"], "proj")):
        with pytest.raises(UsageError, match=f"Qwen3ForCausalLM has no module '{missing}'"):
            policy_model(settings(model_dir, lora_target_modules=names), seed=0)
    with pytest.raises(ValueError, match="'all-linear' cannot be combined"):
        settings(model_dir, lora_target_modules=["all-linear", "lm_head"])
    flags = ["check", str(write_recipe(tmp_path, model_dir)), "--model.lora-r", "2"]
    assert cli.run([*flags, "--model.lora-target-modules", "q_proj,v_proj"]) == 2
    error = capsys.readouterr().err
    assert "has no module 'q_proj,v_proj'" in error
    assert "[q_proj, v_proj] in a recipe, q_proj v_proj on the command line" in error
    assert cli.run([*flags, "--model.lora-target-modules", "q_proj", "v_proj"]) == 0
    assert cli.run([*flags, "--model.lora-target-modules", "lm_head"]) == 2


def test_an_adapter_without_a_tokenizer_has_its_base_s(model_dir: Path, tmp_path: Path) -> None:
    expected = of_peft(model_dir, tmp_path / "theirs")
    assert not list((tmp_path / "theirs").glob("tokenizer*"))
    train(recipe(tmp_path / "theirs", tmp_path / "run", max_steps=1) | {"model.lora_r": 4})
    assert load_tokenizer(source_of(tmp_path / "run" / "final")).get_vocab() == make_tokenizer().get_vocab()
    assert cli.run(["export", str(tmp_path / "theirs"), "-o", str(tmp_path / "merged")]) == 0
    assert_close(logits(complete_model(settings(tmp_path / "merged")).eval()), expected, atol=1e-5, rtol=1e-5)
    # An adapter's own tokenizer has priority.
    make_tokenizer(chat_template="own").save_pretrained(tmp_path / "theirs")
    assert load_tokenizer(source_of(tmp_path / "theirs")).chat_template == "own"


@pytest.mark.parametrize("others", [(), ("config.json",)], ids=["alone", "with its base's settings"])
def test_an_adapter_on_the_hub_is_refused(
    others: tuple[str, ...], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would load its base model and freeze it. The Hub's cache replaces the Hub in this test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--adapter"
    snapshot = repository / "snapshots" / ("a" * 40)
    of_peft(model_dir, snapshot)
    for name in others:
        (snapshot / name).write_bytes((model_dir / name).read_bytes())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    said = "'me/adapter': it is an adapter; download it from the Hub and use its directory"
    start = ModelConfig(model_name_or_path="me/adapter")
    with pytest.raises(UsageError, match=said):
        ModelSource.resolve(start)
    for key in ("model", "discriminator"):
        values = recipe(model_dir, tmp_path / "run", **{key: {"model_name_or_path": "me/adapter"}})
        with pytest.raises(UsageError, match=said):
            train(values)
    assert not (tmp_path / "run").exists()


def test_a_discriminator_s_backbone_is_no_adapter(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    of_peft(model_dir, adapter, target_modules=["q_proj"])
    path = write_recipe(tmp_path, model_dir)
    assert cli.run(["check", str(path), "--discriminator.model-name-or-path", str(adapter)]) == 2
    assert f"merge it with `uniapl export {adapter} -o DIRECTORY`" in capsys.readouterr().err
    assert cli.run(["export", str(adapter), "-o", str(tmp_path / "merged")]) == 0
    assert cli.run(["check", str(path), "--discriminator.model-name-or-path", str(tmp_path / "merged")]) == 0
    command = ["pretrain-discriminator", str(tmp_path / "train.jsonl"), "--policies", str(model_dir)]
    command += [str(tmp_path / "merged"), "--model-name-or-path", str(adapter)]
    assert cli.run([*command, "--output-dir", str(tmp_path / "polar")]) == 2
    assert f"merge it with `uniapl export {adapter} -o DIRECTORY`" in capsys.readouterr().err


def test_a_base_that_has_moved_is_named(model_dir: Path, tmp_path: Path) -> None:
    of_peft(model_dir, tmp_path / "adapter")
    change_settings(tmp_path / "adapter", base_model_name_or_path="build/some/model")
    with pytest.raises(UsageError, match=r"'build/some/model'.*does not exist; set base_model_name_or_path"):
        complete_model(settings(tmp_path / "adapter"))
