"""Whole runs that train an adapter: they learn, resume exactly, save little; what comes out can be merged."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Qwen3Config

import uniapl
from support.adapters import complete_model, policy_model
from support.runs import assert_same_run, lines, recipe, run_until, train, write_recipe
from support.sampling import local_sampler
from support.tiny import SMALL, letter_rows, make_tokenizer, save_model
from uniapl import cli
from uniapl.config import ModelConfig
from uniapl.rollout import SampleRequest
from uniapl.training.checkpoint import directory as checkpoint

LORA: dict[str, Any] = {"model.lora_r": 4, "discriminator.lora_r": 2}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose head can prefer a token by far, as a trained one's can: here it stays as it is."""
    path = save_model(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.norm.weight.mul_(10.0)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def learnt(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of uniapl that has learnt from random weights."""
    path = tmp_path_factory.mktemp("runs") / "learnt"
    values = recipe(
        model_dir,
        path,
        max_steps=60,
        save_steps=60,
        objective={"mu_decay_steps": 60, "beta": 0.0},
        optim={"learning_rate": 1e-2},
        batching={"prompts_per_step": 4, "demonstrations_per_step": 4, "max_tokens_per_micro_batch": 4000},
    )
    train(values | LORA, train_dataset=letter_rows(4, demonstrated=(0, 2)))
    return path


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def mean(records: list[dict[str, Any]], key: str) -> float:
    found = [record[key] for record in records]
    return sum(found) / len(found)


def test_uniapl_learns(learnt: Path) -> None:
    """From random weights, which stay: the reward rises, demonstrations are learnt, the discriminator too."""
    records = lines(learnt / "metrics.jsonl")
    first, last = records[:10], records[-10:]
    assert mean(last, "reward") > mean(first, "reward") + 0.2
    assert mean(last, "sft/nll") < 0.4 * mean(first, "sft/nll")
    assert max(record["discriminator/accuracy"] for record in records) > 0.8
    assert all(record["skipped"] == 0 for record in records)


def test_grpo_learns(model_dir: Path, tmp_path: Path) -> None:
    values = recipe(
        model_dir,
        tmp_path,
        method="grpo",
        max_steps=40,
        save_steps=40,
        objective={"beta": 0.0},
        optim={"learning_rate": 1e-2},
        rollout={"num_generations": 8},
        batching={"prompts_per_step": 4, "max_tokens_per_micro_batch": 4000},
    )
    train(values | {"model.lora_r": 4}, train_dataset=letter_rows(4))
    records = lines(tmp_path / "metrics.jsonl")
    assert mean(records[-10:], "reward") > mean(records[:10], "reward") + 0.1


@pytest.mark.parametrize(("method", "discriminator"), [("grpo", {}), ("uniapl", {"lora_r": 2})])
def test_a_checkpoint_is_small(method: str, discriminator: dict[str, Any], tmp_path: Path) -> None:
    """With both optimizers and the discriminator, beside a model of a few million weights."""
    shape = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    config = Qwen3Config(**SMALL | shape | heads, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    values = recipe(tmp_path / "model", tmp_path / "run", method=method, max_steps=1, save_steps=1)
    train(values | {"model.lora_r": 4, "discriminator": {**values["discriminator"], **discriminator}})
    whole = size(tmp_path / "model")
    assert whole > 60e6
    assert size(checkpoint.checkpoint_path(tmp_path / "run", 1)) < 0.05 * whole
    assert size(tmp_path / "run" / "final") < 0.02 * whole


@pytest.mark.parametrize(
    "objective",
    [{"lambda_controller": "pid"}, {"reference_step": 4, "beta": 0.3}],
    ids=["reference at the start", "reference later"],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(
    objective: dict[str, Any], model_dir: Path, tmp_path: Path
) -> None:
    values = {"max_steps": 10, "save_steps": 5, "objective": objective, **LORA}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe(model_dir, whole, **values))
    run_until(7, recipe(model_dir, broken, **values))
    train(recipe(model_dir, broken, resume="auto", **values))
    assert_same_run(broken, whole, 10)
    records = lines(whole / "metrics.jsonl")
    begins = objective.get("reference_step", 0)
    assert [record["kl"] for record in records[: begins + 1]] == [None] * begins + [0.0]
    assert all(record["kl"] > 1e-6 for record in records[begins + 1 :])
    first, last = (
        load_file(checkpoint.checkpoint_path(whole, s) / "adapter_model.safetensors") for s in (5, 10)
    )
    assert any(not torch.equal(first[key], last[key]) for key in first), "or equality would prove nothing"


def test_stages_go_on_from_each_other_s_adapter_and_resume(model_dir: Path, tmp_path: Path) -> None:
    """The second stage's KL begins at exactly 0: its reference is the first one's adapter, not the base."""
    stages = [{"method": "sft", "max_steps": 3}, {"method": "a-grpo", "max_steps": 3}]
    values = {"stages": stages, "save_steps": 4, **LORA}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe(model_dir, whole, **values))
    run_until(2, recipe(model_dir, broken, **values))
    train(recipe(model_dir, broken, resume="auto", **values))
    assert_same_run(broken, whole, 6)
    assert [record["kl"] for record in lines(whole / "metrics.jsonl")[:4]] == [None, None, None, 0.0]
    between = load_file(whole / "stages" / "1" / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in between.items() if "lora_B" in name)


def test_a_run_may_start_from_an_adapter(learnt: Path, tmp_path: Path) -> None:
    """As an adapter it goes on with it, on the same base; as a whole model it starts from the merged one."""
    start = learnt / "final"
    changes = {"max_steps": 2, "optim": {"learning_rate": 1e-9}, "objective": {"beta": 0.1}}
    train(recipe(start, tmp_path / "adapter", **changes) | LORA)
    assert lines(tmp_path / "adapter" / "metrics.jsonl")[0]["kl"] == 0.0
    said = [json.loads((d / "adapter_config.json").read_text()) for d in (start, tmp_path / "adapter/final")]
    assert said[0] == said[1]
    train(recipe(start, tmp_path / "whole", **changes))
    merged, trained = complete_model(ModelConfig(model_name_or_path=str(start))), tmp_path / "whole" / "final"
    weights = load_file(trained / "model.safetensors")
    for name, tensor in merged.named_parameters():
        assert_close(weights[name], tensor.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["run", "final", "checkpoint"])
def test_the_merged_model_answers_as_the_adapter_does(
    what: str, learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = checkpoint.checkpoint_path(learnt, 60)
    source = {"run": learnt, "final": learnt / "final", "checkpoint": saved}[what]
    capsys.readouterr()
    assert cli.run(["export", str(source), "-o", str(tmp_path / "merged")]) == 0
    assert "its adapter merged" in capsys.readouterr().out
    base = json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"]
    config = ModelConfig(model_name_or_path=base, lora_r=4)
    adapter = policy_model(config, saved, seed=0).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    ids = torch.arange(2, 42).reshape(4, 10)
    with torch.no_grad():
        ours, theirs = merged(ids).logits, adapter(ids).logits
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    prompts = [tuple(make_tokenizer()(row["prompt"])["input_ids"]) for row in letter_rows(4)]
    request = SampleRequest(prompts=prompts, seeds=[0] * 4, num_generations=2)
    answers = [
        local_sampler(model=model, stop_ids={1}, pad_id=0, max_completion_length=12, temperature=0.0).sample(
            request
        )
        for model in (adapter, merged)
    ]
    ours, theirs = ([rollout.completion_ids for group in answer for rollout in group] for answer in answers)
    assert ours == theirs
    assert len(set(ours)) > 1, "or equality would prove little"


def test_a_whole_model_is_exported_too(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(model_dir, tmp_path / "run", method="sft", max_steps=2))
    for source in (tmp_path / "run", checkpoint.checkpoint_path(tmp_path / "run", 2)):
        output = tmp_path / f"of {source.name}"
        capsys.readouterr()
        assert cli.run(["export", str(source), "-o", str(output)]) == 0
        assert "merged" not in capsys.readouterr().out
        ours, theirs = (load_file(d / "model.safetensors") for d in (output, tmp_path / "run" / "final"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert not (output / "state.json").exists()
        assert (output / "tokenizer.json").exists()


def test_what_cannot_be_exported_is_named(
    learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unfinished" / "checkpoints" / "step-000004").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "file").touch()
    gone_on = tmp_path / "gone on"
    (gone_on / "checkpoints" / "step-000001").mkdir(parents=True)
    (gone_on / "final").mkdir()
    (gone_on / "ending.json").write_text(json.dumps({"state": "interrupted", "message": ""}))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "manifest.json").write_text(json.dumps({"model.safetensors": {"bytes": 1, "sha256": ""}}))
    cases = [
        (tmp_path / "nowhere", "new", "not the directory of a run"),
        (tmp_path / "unfinished", "new", "newest checkpoint is .*step-000004"),
        (tmp_path / "empty", "new", "not the directory of a run"),
        (gone_on, "new", "continued after .*/final or .*step-000001"),
        (damaged, "new", "damaged: model.safetensors: missing"),
        (learnt, "taken", "already exists"),
        (learnt, "file", "already exists"),
        (learnt, "file/new", "cannot be written"),
    ]
    for source, output, said in cases:
        assert cli.run(["export", str(source), "-o", str(tmp_path / output)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert re.search(said, error), error
    assert not (tmp_path / "new").exists()


def test_a_link_is_written_through(model_dir: Path, tmp_path: Path) -> None:
    """To an empty directory, or to none; what stood there before is there afterwards."""
    (tmp_path / "empty").mkdir()
    for target in ("empty", "none"):
        link = tmp_path / f"link to {target}"
        link.symlink_to(tmp_path / target)
        assert cli.run(["export", str(model_dir), "-o", str(link)]) == 0
        assert link.readlink() == tmp_path / target
        assert (tmp_path / target / "model.safetensors").is_file()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"empty", "none", "link to empty", "link to none"}


@pytest.mark.parametrize("what", ["the working directory", "a mount"])
def test_a_directory_that_must_stay_is_refused_before_anything_is_loaded(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("source", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    if what == "a mount":
        monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "here")
    else:
        monkeypatch.chdir(tmp_path / "here")
    output = {"a mount": str(tmp_path / "here"), "the working directory": "."}[what]
    # The source cannot be loaded either.
    assert cli.run(["export", str(tmp_path / "source"), "-o", output]) == 2
    assert f"'{output}' cannot be replaced: name a new directory inside it" in capsys.readouterr().err


def test_a_checkpoint_of_the_other_kind_is_refused(model_dir: Path, tmp_path: Path) -> None:
    train(recipe(model_dir, tmp_path / "whole", method="sft", max_steps=2))
    train(recipe(model_dir, tmp_path / "adapter", method="sft", max_steps=2) | {"model.lora_r": 4})
    again = {"method": "sft", "max_steps": 4, "resume": "auto"}
    with pytest.raises(uniapl.UsageError, match="contains a complete model; the recipe trains an adapter"):
        train(recipe(model_dir, tmp_path / "whole", **again) | {"model.lora_r": 4})
    with pytest.raises(uniapl.UsageError, match="contains an adapter; the recipe trains the complete model"):
        train(recipe(model_dir, tmp_path / "adapter", **again))
    with pytest.raises(uniapl.UsageError, match="r 4 instead of 2"):
        train(recipe(model_dir, tmp_path / "adapter", **again) | {"model.lora_r": 2})


def test_other_verbs_read_an_adapter(
    learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chat, evaluation and the report's analysis merge what they load."""
    final = learnt / "final"
    monkeypatch.setattr(sys, "stdin", io.StringIO("say a.\n"))
    assert cli.run(["chat", str(final), "--temperature", "0", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in letter_rows(4)))
    arguments = ["--suites", str(rows), "--rewards", "lowercase", "--max-completion-length", "8"]
    arguments += ["--output-dir", str(tmp_path / "results")]
    assert cli.run(["evaluate", str(final), *arguments]) == 0
    assert cli.run(["report", str(learnt), "--model-analysis", "-o", str(tmp_path / "page.html")]) == 0
    found = json.loads((learnt / "analysis.json").read_text())["answers"]["expert"]
    base, trained = (sum(found[name]["means"]) / len(found[name]["means"]) for name in ("base", "final"))
    assert trained > base + 0.5


def test_the_card_says_that_it_is_an_adapter(learnt: Path) -> None:
    card = (learnt / "final" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft"
    assert "lora" in front["tags"]
    assert "A LoRA adapter of rank 4" in card


def test_a_frozen_model_of_the_start_is_no_second_one(model_dir: Path, tmp_path: Path) -> None:
    """Of density-ratio: the base against a model of the expert; equal to what a whole model's run says."""
    expert = save_model(tmp_path / "expert", seed=1)
    adversary = {"kind": "density-ratio", "model_name_or_path": str(expert), "min_accuracy": 0.0}
    values = {"max_steps": 2, "optim": {"learning_rate": 1e-12}, "discriminator": adversary}
    for name, changes in (("whole", {}), ("adapter", {"model.lora_r": 4})):
        train(recipe(model_dir, tmp_path / name, **values) | changes)
    whole, adapter = (lines(tmp_path / name / "metrics.jsonl")[1] for name in ("whole", "adapter"))
    for key in ("discriminator/win_rate", "discriminator/margin", "loss", "kl", "sft/nll"):
        assert adapter[key] == pytest.approx(whole[key], abs=1e-6), key


def test_adapters_of_the_discriminator_may_be_frozen_where_the_base_stays(
    model_dir: Path, tmp_path: Path
) -> None:
    freeze = {"discriminator": {"lora_r": 2, "freeze_after_steps": 2, "warmup_steps": 1, "min_accuracy": 0.0}}
    with pytest.raises(uniapl.UsageError, match="cannot freeze adapters"):
        train(recipe(model_dir, tmp_path / "whole", **freeze))
    train(recipe(model_dir, tmp_path / "adapter", **freeze) | {"model.lora_r": 4})
    updates = [r["discriminator/updates"] for r in lines(tmp_path / "adapter" / "metrics.jsonl")]
    # The first prompts that are drawn have no demonstration.
    assert [count > 0 for count in updates] == [False, True, False, False]


def test_check_counts_the_adapter_alone_and_refuses_what_training_would(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stays: the base and the adapter; of the optimizer and the reference, the adapter's share."""
    path = write_recipe(tmp_path, model_dir, objective={"beta": 0.1, "reference_step": 0})

    def memory(*flags: str) -> dict[str, Any]:
        assert cli.run(["check", str(path), "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)["memory"][0]

    def stays(*flags: str) -> dict[str, int]:
        return memory(*flags)["stays"]

    def update(*flags: str) -> int:
        return memory(*flags)["passes"]["update"]

    whole = stays()
    lora = stays("--model.lora-r", "4", "--discriminator.lora-r", "2")
    policy = policy_model(ModelConfig(model_name_or_path=str(model_dir), lora_r=4), seed=0)
    adapter = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    assert lora["policy"] == pytest.approx(whole["policy"] + adapter, rel=0.01)
    assert (lora["optimizer"], lora["reference"]) == (2 * adapter, adapter)
    assert "discriminator" not in lora
    # A copy of the base learns as a whole, whatever the policy is.
    copied = stays("--model.lora-r", "4")["discriminator"]
    assert copied == whole["discriminator"]
    deep = Qwen3Config(**SMALL | {"num_hidden_layers": 6})
    AutoModelForCausalLM.from_config(deep).save_pretrained(tmp_path / "deep")
    make_tokenizer().save_pretrained(tmp_path / "deep")
    model = ("--model.model-name-or-path", str(tmp_path / "deep"))
    assert update("--optim.gradient-checkpointing", "True", *model) < 0.6 * update(*model)
    flags = ["--model.lora-r", "4", "--model.lora-target-modules", "wq"]
    assert cli.run(["check", str(path), *flags]) == 2
    assert "lora_target_modules: Qwen3ForCausalLM has no module 'wq'" in capsys.readouterr().err


def test_check_accepts_a_density_ratio_expert_that_is_an_adapter(
    learnt: Path, model_dir: Path, tmp_path: Path
) -> None:
    adversary = {"kind": "density-ratio", "model_name_or_path": str(learnt / "final")}
    assert cli.run(["check", str(write_recipe(tmp_path, model_dir, discriminator=adversary))]) == 0


def test_space_is_asked_for_what_is_saved(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checkpoints of an adapter with two moments of it, and the adapter once more as the result."""
    needed: list[int] = []
    monkeypatch.setattr(
        "uniapl.training.checkpoint.disk.check_space", lambda run_dir, count: needed.append(count)
    )
    train(recipe(model_dir, tmp_path / "run", method="grpo") | {"model.lora_r": 1})
    adapter = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert needed == [(2 * 3 + 1) * sum(tensor.nbytes for tensor in adapter.values())]


@pytest.mark.parametrize("extra", [{}, {"model.lora_r": 4}], ids=["whole", "adapter"])
def test_recomputed_layers_change_no_step(extra: dict[str, Any], model_dir: Path, tmp_path: Path) -> None:
    """Only how it is computed: the same metrics to the last bit, with each force's own gradient."""
    values = {"log_gradients_steps": 1, "max_steps": 3, **extra}
    train(recipe(model_dir, tmp_path / "kept", **values))
    train(recipe(model_dir, tmp_path / "again", **values) | {"optim.gradient_checkpointing": True})
    kept, again = (
        [{k: v for k, v in r.items() if "time" not in k} for r in lines(tmp_path / name / "metrics.jsonl")]
        for name in ("kept", "again")
    )
    assert kept == again
