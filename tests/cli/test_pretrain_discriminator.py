"""`uniapl pretrain-discriminator`: training, use in a run, and refusals."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import normalizers
from transformers import AutoModelForCausalLM

from support.runs import lines, recipe, train
from support.tiny import make_model, make_tokenizer, save_model
from uniapl import cli
from uniapl.cli.pretrain_discriminator import _parse, _sample_all, _triples
from uniapl.discriminator.polar import END, SEPARATOR, Polar
from uniapl.types import Example


def save_policy(path: Path, favourite: int) -> str:
    """A model that writes mostly one letter: its head is biased towards that token."""
    model = make_model(scale=1.0)
    untied = AutoModelForCausalLM.from_config(
        type(model.config)(**{**model.config.to_dict(), "tie_word_embeddings": False})
    )
    with torch.no_grad():
        for parameter in untied.parameters():
            parameter.mul_(0.1)
        norm = untied.base_model.norm.weight
        norm.fill_(1.0)
        untied.lm_head.weight.zero_()
        untied.base_model.embed_tokens.weight.fill_(1.0)
        untied.lm_head.weight[favourite] = 0.2
        untied.lm_head.weight[1] = 0.12
    untied.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("policies")
    return [save_policy(path / str(favourite), favourite) for favourite in (5, 9, 20)]


def write_data(path: Path, *, demonstrations: bool) -> Path:
    rows = [
        {"prompt": f"say {letter}."} | ({"completion": "zzz"} if demonstrations else {})
        for letter in "abcdefghijklmnopqrstuvwxyz"
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_it_distinguishes_policies_and_a_run_uses_it(policies: list[str], tmp_path: Path) -> None:
    backbone = save_model(tmp_path / "backbone")
    data = write_data(tmp_path / "data.jsonl", demonstrations=True)
    output = tmp_path / "discriminator"
    command = ["pretrain-discriminator", str(data), "--policies", *policies, "--output-dir", str(output)]
    settings = ["--steps", "100", "--learning-rate", "3e-3", "--max-completion-length", "6", "--samples", "3"]
    assert cli.run([*command, "--model-name-or-path", str(backbone), *settings]) == 0
    result = json.loads((output / "training.json").read_text())
    assert 0 < result["held_out_prompts"] < 13
    assert result["held_out_accuracy"] > 0.8
    # The policy that wrote the reference is preferred.
    polar = Polar.load(str(output), trust_remote_code=False, max_tokens=10_000, device=torch.device("cpu"))
    for own, other in (("bbbb", "ffff"), ("ffff", "bbbb")):
        texts = [polar.format.text("say a.", own, candidate) for candidate in (own, other)]
        same, different = polar.logits(texts).tolist()
        assert same > different
    tokens = json.loads((output / "tokenizer.json").read_text())["added_tokens"]
    assert {SEPARATOR, END} <= {token["content"] for token in tokens}

    adversary = {"kind": "polar", "model_name_or_path": str(output)}
    train(recipe(backbone, tmp_path / "run", method="a-grpo", discriminator=adversary))
    assert "discriminator/accuracy" in lines(tmp_path / "run" / "metrics.jsonl")[-1]


def test_unusable_options_and_data_are_refused(
    policies: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data.jsonl", demonstrations=False)
    backbone = ["--model-name-or-path", policies[0], "--max-completion-length", "2"]

    def refused(*arguments: str) -> str:
        command = ["pretrain-discriminator", str(data), *backbone, *arguments]
        assert cli.run([*command, "--output-dir", str(tmp_path / "output")]) == 2
        assert not (tmp_path / "output").exists()
        return capsys.readouterr().err

    assert "two policies with two completions" in refused("--policies", policies[0])
    assert "--samples must be at least 2" in refused("--policies", *policies, "--samples", "1")
    for name in ("--steps", "--batch-size", "--max-tokens", "--max-completion-length"):
        assert f"{name} must be at least 1" in refused("--policies", *policies, name, "0")
    for seed in ("-1", str(2**32)):
        assert "--seed must be" in refused("--policies", *policies, "--seed", seed)
    for rate in ("0", "nan", "inf"):
        assert "--learning-rate must be" in refused("--policies", *policies, "--learning-rate", rate)
    assert "directory not found" in refused("--policies", str(tmp_path / "nowhere"))
    two = ("--policies", *policies)
    assert "cannot load the backbone" in refused(*two, "--model-name-or-path", str(tmp_path / "nowhere"))
    data.write_text("")
    assert "no rows" in refused(*two)
    data.write_text('{"question": "a"}\n')
    assert "row 1" in refused(*two)
    write_data(data, demonstrations=False)
    assert (
        cli.run(["pretrain-discriminator", str(data), *backbone, "--policies", "x", "--output-dir", "."]) == 2
    )
    assert "already exists" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_and_writes_nothing(
    policies: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bad(same: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (same - other).sum() * float("nan")

    monkeypatch.setattr("uniapl.cli.pretrain_discriminator.bradley_terry_loss", bad)
    data = write_data(tmp_path / "data.jsonl", demonstrations=False)
    command = ["pretrain-discriminator", str(data), "--model-name-or-path", policies[0], "--steps", "2"]
    command += [
        "--policies",
        *policies[:2],
        "--max-completion-length",
        "2",
        "--output-dir",
        str(tmp_path / "o"),
    ]
    assert cli.run(command) == 1
    assert "step 1: the loss or its gradient is not finite" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_policy_with_a_coarser_tokenizer_samples_every_prompt(policies: list[str], tmp_path: Path) -> None:
    """Otherwise its completions would be assigned to the wrong prompts."""
    shutil.copytree(policies[1], tmp_path / "lower")
    lower = make_tokenizer()
    backend: Any = lower.backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    lower.save_pretrained(tmp_path / "lower")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"say {x}."}) for x in "aAbab"))
    for pair in ([policies[0], str(tmp_path / "lower")], [str(tmp_path / "lower"), policies[0]]):
        arguments = [
            str(data),
            "--policies",
            *pair,
            "--model-name-or-path",
            "x",
            "--max-completion-length",
            "2",
        ]
        examples, texts = _sample_all(_parse(arguments), torch.device("cpu"), Console(quiet=True))
        first_sees_all = pair[0] == policies[0]
        assert [example.row for example in examples] == ([1, 2, 3] if first_sees_all else [1, 3])
        assert [len(completions) for completions in texts[:2]] == [len(examples)] * 2


def test_every_policy_is_as_often_the_other_one_as_the_reference() -> None:
    """The expert, with one completion per prompt, is left out: it could only lose."""
    texts = [[["a", "A"]], [["b", "B"]], [["c", "C"]], [["expert"]]]
    example = Example(
        row=1, prompt="p", prompt_ids=(5,), demonstration=None, demonstration_ids=None, columns={}
    )
    draw = itertools.islice(_triples([example], texts, {0}, 0, "test"), 3000)
    counts: dict[str, list[int]] = {letter: [0, 0] for letter in "abc"}
    for triple in draw:
        assert triple.reference.lower() == triple.same.lower() != triple.other.lower()
        assert triple.reference != triple.same
        counts[triple.same.lower()][0] += 1
        counts[triple.other.lower()][1] += 1
    assert all(900 < count < 1100 for pair in counts.values() for count in pair)
