"""Models whose files lack tensors, or hold others: refused by name, by `train` and by `check`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    Qwen3Config,
)

import uniapl
from support.candidates import polar_tokenizer
from support.runs import recipe, train, write_recipe
from support.tiny import SMALL, make_tokenizer, save_model
from uniapl import cli
from uniapl.cli.check import check_run
from uniapl.config import ModelConfig
from uniapl.config.resolve import load_recipe, resolve
from uniapl.discriminator.polar import Polar
from uniapl.models.loading import ModelSource, check_policy, has_local_weights, load_model, pad_id_of
from uniapl.models.tensors import refuse_other_tensors
from uniapl.rewards.model import reward_model
from uniapl.training.checkpoint import directory as checkpoint

Tensors = dict[str, Tensor]


def edit(path: Path, change: Callable[[Tensors], Tensors], file: str = "model.safetensors") -> Path:
    """Rewrite the weights of a model directory."""
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(path / file)).items()}
    save_file(tensors, path / file, metadata={"format": "pt"})
    return path


def configure(path: Path, **values: Any) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return path


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def classifier(path: Path, labels: int = 1) -> Path:
    torch.manual_seed(5)
    config = Qwen3Config.from_dict({**SMALL, "vocab_size": 70, "num_labels": labels})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    polar_tokenizer().save_pretrained(path)
    return path


def source_of(path: Path) -> ModelSource:
    return ModelSource.resolve(ModelConfig(model_name_or_path=str(path)))


def assert_refused(path: Path, message: str) -> None:
    """By the real load and by the load of the headers alone, with the same words."""
    for load in (load_model, lambda source: check_policy(source, ModelConfig())):
        with pytest.raises(uniapl.UsageError, match=message):
            load(source_of(path))


@pytest.mark.case(1)
@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module."])
def test_prefixed_names_are_refused_with_their_prefix(family: str, prefix: str, tmp_path: Path) -> None:
    edit(save_model(tmp_path, family=family), prefixed(prefix))
    assert_refused(tmp_path, f"(?s)tensors are missing from its files.*begin with '{prefix}'")


@pytest.mark.case(1)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without(".layers.1."),
            r"11 tensors are missing from its files \(model.layers.1.input_layernorm.weight, .* and 7 more\)",
        ),
        (
            without("layers.0.mlp.up_proj"),
            r"1 tensor is missing from its files \(model.layers.0.mlp.up_proj.weight\)",
        ),
        (
            without("embed_tokens"),
            r"2 tensors are missing from its files \(lm_head.weight, model.embed_tokens.weight\)",
        ),
        (renamed("model.norm.weight", "model.last_norm.weight"), r"\(model.last_norm.weight\): rename"),
    ],
)
def test_missing_tensors_are_named(
    change: Callable[[Tensors], Tensors], message: str, tmp_path: Path
) -> None:
    edit(save_model(tmp_path), change)
    assert_refused(tmp_path, message)


def test_a_head_that_is_not_tied_must_be_in_the_files(tmp_path: Path) -> None:
    """A tied head need not: qwen3's file holds only the embedding."""
    tied = save_model(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    check_policy(source_of(tied), ModelConfig())
    model: Any = load_model(source_of(tied))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    untied = edit(save_model(tmp_path / "untied", family="llama"), without("lm_head"))
    assert_refused(
        untied, r"1 tensor is missing from its files \(lm_head.weight\).*set tie_word_embeddings to true"
    )


def test_other_shapes_are_named(tmp_path: Path) -> None:
    edit(
        save_model(tmp_path),
        lambda tensors: tensors | {"model.norm.weight": torch.ones(31)},
    )
    assert_refused(tmp_path, r"model.norm.weight \[31\] instead of \[32\]")


@pytest.mark.parametrize(
    ("family", "name", "inside"),
    [
        ("qwen3", "model.layers.2.mlp.up_proj.weight", True),
        ("qwen3", "layers.2.mlp.up_proj.weight", True),
        ("qwen3", "model.layers.0.self_attn.q_proj.bias", True),
        ("qwen3", "lm_head.bias", True),
        ("gpt2", "transformer.h.2.ln_1.weight", True),
        ("gpt2", "h.2.ln_1.weight", True),
        ("qwen3", "v_head.summary.weight", False),
        ("qwen3", "score.weight", False),
        ("qwen3", "model.vision_tower.patch.weight", False),
        ("qwen3", "model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("gpt2", "transformer.h.0.attn.masked_bias", False),
        ("gpt2", "h.0.attn.bias", False),
        ("llama", "model.layers.0.self_attn.q_norm.weight", True),
        ("llama", "model.layers.1.mlp.up_proj.weight_scale", True),
    ],
)
def test_tensors_of_a_layer_that_the_configuration_lacks_are_refused(
    family: str, name: str, inside: bool, tmp_path: Path
) -> None:
    """Another head or a part for images does not change the text model."""
    edit(save_model(tmp_path, family=family), lambda tensors: tensors | {name: torch.zeros(3)})
    if inside:
        assert_refused(tmp_path, r"tensors of its layers that its config.json does not have")
    else:
        check_policy(source_of(tmp_path), ModelConfig())
        load_model(source_of(tmp_path))


def test_a_head_that_differs_from_its_embedding_is_saved_as_untied(tmp_path: Path) -> None:
    """transformers does not tie them; the configuration must say so, or another program would."""
    edit(
        save_model(tmp_path / "both"),
        lambda tensors: tensors | {"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]},
    )
    model = load_model(source_of(tmp_path / "both"))
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    head, table = again.get_output_embeddings().weight, again.get_input_embeddings().weight
    assert torch.equal(head, 2 * table)


@pytest.mark.case(1)
@pytest.mark.parametrize("verb", ["train", "check"])
def test_train_and_check_end_with_2(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(save_model(tmp_path / "model"), prefixed("module."))
    path = write_recipe(tmp_path, tmp_path / "model")
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, str(path), "--method", "sft", "--max-steps", "1"])
    assert ended.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "begin with 'module.'" in error
    assert "lm_head.weight" in error
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_file_in_shards_is_checked(tmp_path: Path) -> None:
    save_model(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").unlink()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check_policy(source_of(tmp_path), ModelConfig())
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(name for name in content["weight_map"] if "layers.1" in name)
    edit(tmp_path, without(name), content["weight_map"][name])
    assert_refused(tmp_path, name)


@pytest.mark.case(2)
def test_a_reward_model_with_another_head_is_refused(tmp_path: Path) -> None:
    reward = edit(classifier(tmp_path / "reward"), renamed("score.weight", "v_head.weight"))
    with pytest.raises(
        uniapl.UsageError, match=r"1 tensor is missing from its files \(score.weight\).*\(v_head.weight\)"
    ):
        reward_model(["a"], ["b"], model=str(reward))
    save_model(tmp_path / "model")
    functions = [{"name": "reward_model", "args": {"model": str(reward)}}]
    path = write_recipe(tmp_path, tmp_path / "model", rewards={"functions": functions}, method="grpo")
    for verb in ("train", "check"):
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, str(path)])
        assert ended.value.code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("score"), r"score.weight"),
        (without(".layers.1."), r"11 tensors are missing"),
        (prefixed("module."), r"begin with 'module.'"),
    ],
)
def test_a_polar_model_without_head_or_layers_is_refused_before_training(
    change: Callable[[Tensors], Tensors], message: str, model_dir: Path, tmp_path: Path
) -> None:
    polar = edit(classifier(tmp_path / "polar"), change)
    with pytest.raises(uniapl.UsageError, match=message):
        Polar.load(str(polar), trust_remote_code=False, max_tokens=100, device=torch.device("cpu"))
    discriminator = {"kind": "polar", "model_name_or_path": str(polar)}
    with pytest.raises(uniapl.UsageError, match=message):
        train(recipe(model_dir, tmp_path / "run", discriminator=discriminator))
    assert not (tmp_path / "run").exists()


def test_a_polar_model_is_a_classifier_with_one_output(tmp_path: Path) -> None:
    with pytest.raises(uniapl.UsageError, match="has 2 outputs"):
        Polar.load_classifier(str(classifier(tmp_path / "two", labels=2)), trust_remote_code=False)
    trunk = save_model(tmp_path / "language")
    polar_tokenizer().save_pretrained(trunk)
    with pytest.raises(uniapl.UsageError, match=r"1 tensor is missing from its files \(score.weight\)"):
        Polar.load_classifier(str(trunk), trust_remote_code=False)


@pytest.mark.parametrize("kind", ["bradley-terry", "density-ratio"])
@pytest.mark.parametrize("change", [prefixed("_orig_mod."), without(".layers.1.")])
def test_a_discriminator_s_backbone_is_checked_before_the_first_stage(
    kind: str, change: Callable[[Tensors], Tensors], model_dir: Path, tmp_path: Path
) -> None:
    """Also for a later stage, and by `check`."""
    backbone = edit(save_model(tmp_path / "backbone"), change)
    discriminator = {"kind": kind, "model_name_or_path": str(backbone)}
    stages = [{"method": "sft", "max_steps": 1}, {"method": "a-grpo", "discriminator": discriminator}]
    with pytest.raises(uniapl.UsageError, match="missing from its files"):
        train(recipe(model_dir, tmp_path / "run", stages=stages))
    assert not (tmp_path / "run").exists()
    path = write_recipe(tmp_path, model_dir, discriminator=discriminator)
    with pytest.raises(uniapl.UsageError, match=r"missing from its files"):
        check_run(resolve(load_recipe(path)))


def test_a_new_head_may_be_missing_but_not_the_trunk() -> None:
    model = AutoModelForSequenceClassification.from_config(LlamaConfig.from_dict({**SMALL, "num_labels": 1}))
    info: dict[str, Any] = {"unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    refuse_other_tensors(model, info | {"missing_keys": {"score.weight"}}, "x", new_head=True)
    with pytest.raises(uniapl.UsageError, match=r"model\.norm\.weight"):
        refuse_other_tensors(
            model, info | {"missing_keys": {"score.weight", "model.norm.weight"}}, "x", new_head=True
        )


def test_headers_do_not_read_the_tensors(tmp_path: Path) -> None:
    """A file with a complete header and no data, as large as it says."""
    save_model(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:header] + bytes(len(content) - header))
    check_policy(source_of(tmp_path), ModelConfig())


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_a_result_has_the_files_of_the_model_it_started_from(pad: str | None, tmp_path: Path) -> None:
    """Also with a tokenizer without pad token: with the end token as its pad token, the next program that
    masks pad tokens would not train the model to stop."""
    model = save_model(tmp_path / "model", chat_template="{{ messages[0]['content'] }}")
    tokenizer = make_tokenizer(chat_template="{{ messages[0]['content'] }}")
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(model)
    generation = {"eos_token_id": [1, 3], "do_sample": True, "temperature": 0.7, "top_k": 20}
    (model / "generation_config.json").write_text(json.dumps(generation))
    result = train(recipe(model, tmp_path / "run", max_steps=1))
    folders = [result.final_dir, checkpoint.checkpoint_path(tmp_path / "run", 1)]
    output = tmp_path / "exported"
    assert cli.run(["export", str(tmp_path / "run"), "-o", str(output)]) == 0
    for folder in (*folders, output):
        again = AutoTokenizer.from_pretrained(folder)
        assert again.pad_token == pad
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.chat_template == tokenizer.chat_template
        assert again.encode("say a.") == tokenizer.encode("say a.")
        saved = json.loads((folder / "generation_config.json").read_text())
        assert {key: saved[key] for key in generation} == generation
        config, before = (json.loads((path / "config.json").read_text()) for path in (folder, model))
        assert config == before


def test_a_tokenizer_without_pad_and_end_token_is_refused() -> None:
    tokenizer = make_tokenizer()
    assert pad_id_of(tokenizer) == 0
    tokenizer.pad_token = None
    assert pad_id_of(tokenizer) == 1
    tokenizer.eos_token = None
    with pytest.raises(uniapl.UsageError, match="neither a pad token nor an end token"):
        pad_id_of(tokenizer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_export_has_the_precision_that_was_asked_for(dtype: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    assert cli.run(["export", str(model), "-o", str(tmp_path / "out"), "--dtype", dtype]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == getattr(torch, dtype)
        assert torch.equal(after[name], tensor.to(getattr(torch, dtype)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_an_export_that_would_overflow_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = edit(save_model(tmp_path / "model"), lambda t: t | {"model.norm.weight": torch.full((32,), 1e6)})
    words = ["export", str(model), "-o", str(tmp_path / "out"), "--dtype"]
    assert cli.run([*words, "float16"]) == 2
    assert "model.norm.weight has values beyond its range" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.run([*words, "bfloat16"]) == 0


def test_check_downloads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub model is checked if all its files are in the cache."""
    cache: dict[str, str] = {}
    monkeypatch.setattr("uniapl.models.loading.try_to_load_from_cache", lambda _, file, **__: cache.get(file))
    assert check_policy(ModelSource(base="an/id"), ModelConfig()) is False
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    cache |= {index.name: str(index), "one.safetensors": "there"}
    assert not has_local_weights("an/id")
    cache["two.safetensors"] = "there"
    assert has_local_weights("an/id")
    cache.clear()
    cache["model.safetensors"] = "there"
    assert has_local_weights("an/id")
    assert has_local_weights(str(tmp_path))


def test_weights_in_bin_files_are_refused_with_the_remedy(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert_refused(path, "its weights are in .bin files.*convert them to safetensors")


def test_a_file_in_place_of_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.jsonl").write_text("{}")
    with pytest.raises(uniapl.UsageError, match=r"model.jsonl': it is a file; name a model's directory"):
        load_model(source_of(tmp_path / "model.jsonl"))
