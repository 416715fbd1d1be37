"""`uniapl check` finds what `uniapl train` would find before its first step."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.runs import train, write_recipe
from support.tiny import letter_rows, make_model, make_tokenizer, save_model
from uniapl import cli
from uniapl.config import Config
from uniapl.config.objective import KEYS_OF_KINDS, DiscriminatorConfig
from uniapl.config.resolve import load_recipe
from uniapl.training.preflight.checks import notes_on_adversary
from uniapl.types import Example

VERBS = pytest.mark.parametrize("verb", ["check", "train"])


def notes(capsys: pytest.CaptureFixture[str], path: Path, *flags: str) -> list[str]:
    capsys.readouterr()
    assert cli.run(["check", str(path), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)["notes"]


@VERBS
def test_a_tracker_that_is_not_installed(
    verb: str,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = write_recipe(tmp_path, model_dir, report_to=["wandb"])
    assert cli.run([verb, str(path)]) == 2
    assert capsys.readouterr().err == "error: report_to: 'wandb' is not installed: pip install wandb\n"


def test_an_output_directory_that_is_taken(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, model_dir, max_steps=2)
    train(load_recipe(path), train_dataset=None, reward_functions=[])
    before = sorted((file, file.stat().st_mtime_ns) for file in (tmp_path / "run").rglob("*"))
    for verb in ("check", "train"):
        capsys.readouterr()
        assert cli.run([verb, str(path)]) == 2
        said = capsys.readouterr().err
        assert f"output_dir '{tmp_path / 'run'}' already holds a run (" in said
        assert "continue it with --resume auto, replace it with --overwrite" in said
    assert notes(capsys, path, "--overwrite") == []
    assert notes(capsys, path, "--resume", "auto") == [
        "this run is complete; to continue it, set a larger --max-steps"
    ]
    assert "changed since the run was last started: seed: 0 -> 3" in notes(
        capsys, path, "--resume", "auto", "--seed", "3", "--max-steps", "4"
    )
    assert cli.run(["check", str(path), "--resume", "auto", "--method", "sft"]) == 2
    assert "was made with methods uniapl; the recipe has sft" in capsys.readouterr().err
    after = sorted((file, file.stat().st_mtime_ns) for file in (tmp_path / "run").rglob("*"))
    assert [file for file, _ in after] == [file for file, _ in before]


@VERBS
def test_an_output_directory_that_cannot_be_made(
    verb: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    path = write_recipe(tmp_path, model_dir)
    for name in ("file", "file/run", "a\0b"):
        assert cli.run([verb, str(path), "--output-dir", str(tmp_path / name)]) == 2
        assert "cannot be written: " in capsys.readouterr().err


@VERBS
def test_a_run_that_another_process_uses(
    verb: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from uniapl.training.checkpoint.disk import exclusive

    path = write_recipe(tmp_path, model_dir)
    with exclusive(tmp_path / "run"):
        assert cli.run([verb, str(path)]) == 2
    assert "another run is using output_dir" in capsys.readouterr().err


def test_prompts_whose_reward_the_adversary_cannot_change(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = letter_rows(6, demonstrated=(0, 2, 4))
    del rows[0]["letter"], rows[4]["letter"]
    (tmp_path / "mine.py").write_text("def has(completions, letter):\n    return [1.0] * len(completions)\n")
    rewards = {"functions": [f"{tmp_path / 'mine.py'}:has"]}
    multiply = {"adversarial_placement": "multiply"}
    path = write_recipe(tmp_path, model_dir, rows=rows, objective=multiply, rewards=rewards)
    changed = (
        "2 of 6 sampled prompts have no reward that objective.adversarial_placement multiply could change, "
        "so that the adversary does not act on their completions: add a reward function that applies to "
        "them, or set objective.adversarial_placement to loss (rows 1, 5)"
    )
    assert notes(capsys, path) == [changed]
    assert notes(capsys, path, "--objective.adversarial-placement", "loss") == []
    assert notes(capsys, path, "--method", "grpo") == []


def test_keys_of_another_kind_of_discriminator() -> None:
    rewarder: Any = SimpleNamespace(applies_to=lambda e: True)
    dataset: Any = SimpleNamespace(examples=[example(1, (7, 1), reward=True)])

    def found(*, lam: float = 1.0, **discriminator: Any) -> list[str]:
        values = {"discriminator": discriminator, "objective": {"lambda_adv": lam}}
        return notes_on_adversary([Config.model_validate(values)] * 2, dataset, rewarder)

    rate = "discriminator.learning_rate has no effect with kind reference-likelihood: it belongs to head and "
    assert found(learning_rate=1e-3) == [rate + "bradley-terry"]
    assert found(warmup_steps=10) == [], "the default"
    assert found(learning_rate=1e-3, lam=0.0) == [], "without an adversary"
    assert found(learning_rate=1e-3, kind="head") == []
    expected = "discriminator.layers has no effect with kind density-ratio: it belongs to head"
    assert found(layers=(1,), kind="density-ratio") == [expected]
    known = {key for keys in KEYS_OF_KINDS.values() for key in keys}
    of_several = {"kind", "model_name_or_path", "trust_remote_code", "min_accuracy"}
    assert known | of_several == set(DiscriminatorConfig.model_fields), "a new key has its kinds"


def test_a_discriminator_that_needs_demonstrations_where_the_rewards_are() -> None:
    disjoint = [example(1, None, reward=True), example(2, (7, 1), reward=False)]
    both = [*disjoint, example(3, (7, 1), reward=True)]
    rewarder: Any = SimpleNamespace(applies_to=lambda e: e.columns["reward"])

    def found(kind: str, placement: str, rows: list[Example]) -> list[str]:
        values = {"discriminator": {"kind": kind}, "objective": {"adversarial_placement": placement}}
        dataset: Any = SimpleNamespace(examples=rows)
        return notes_on_adversary([Config.model_validate(values)] * 2, dataset, rewarder)

    never = (
        "the adversary is never used: discriminator.kind polar compares a completion with the demonstration "
        "of its prompt, objective.adversarial_placement reward changes its reward, and no row has both. Add "
        "a 'completion' to rows with a reward"
    )
    assert found("polar", "reward", disjoint) == [never]
    assert found("polar", "loss", disjoint) == []
    assert [note[:45] for note in found("polar", "reward", both)] == [
        "1 of 3 sampled prompts have no reward that ob"
    ]
    assert "1 of 2 sampled prompts" in found("head", "multiply", disjoint)[0], (
        "the mean logit takes its place"
    )


def example(row: int, demonstration_ids: tuple[int, ...] | None, *, reward: bool) -> Example:
    return Example(
        row=row,
        prompt="p",
        prompt_ids=(5,),
        demonstration="d" if demonstration_ids else None,
        demonstration_ids=demonstration_ids,
        columns={"reward": reward},
    )


def test_demonstrations_that_no_rollout_can_reach(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = letter_rows(6, demonstrated=())
    for number, length in ((0, 5), (2, 6), (3, 40)):
        rows[number]["completion"] = "a" * length  # and the end token
    path = write_recipe(tmp_path, model_dir, rows)  # rollouts of 6 tokens
    note = (
        "2 of 3 demonstrations are longer than rollout.max_completion_length 6, the longest has 41 tokens, "
        "so that rollouts cannot reach them: raise it, or leave them out with "
        "data.max_demonstration_length (rows 3, 4)"
    )
    assert notes(capsys, path) == [note]
    assert notes(capsys, path, "--rollout.max-completion-length", "41") == []
    for method in ("grpo", "sft"):
        assert not any("longer" in note for note in notes(capsys, path, "--method", method))
    assert cli.run(["train", str(path), "--max-steps", "1"]) == 0
    assert f"note: {note}" in capsys.readouterr().out


@VERBS
@pytest.mark.parametrize("pad_is_unknown", [False, True])
def test_a_tokenizer_that_does_not_know_the_text(
    verb: str, pad_is_unknown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer()
    if pad_is_unknown:
        tokenizer.pad_token = "<unk>"
    make_model(scale=1.0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows: list[dict[str, Any]] = [{"prompt": "12345 6.", "completion": "789"}, {"prompt": "12 b."}]
    path = write_recipe(tmp_path, tmp_path / "model", rows)
    assert cli.run([verb, str(path)]) == 2
    said = capsys.readouterr().err
    names = "'<unk>'" if pad_is_unknown else "'<pad>' or '<unk>'"
    # 6 + 3 + 2 digits of 8 + 4 + 5 tokens
    fits = f"the tokenizer does not fit the data, 65% of whose tokens are {names}. Use the tokenizer"
    assert f"{tmp_path / 'train.jsonl'}: row 1 and others: {fits}" in said


def test_a_few_unknown_characters_are_a_note(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = letter_rows()
    rows[1]["prompt"], rows[4]["completion"] = "say 1+1.", "é"
    path = write_recipe(tmp_path, model_dir, rows)
    assert notes(capsys, path) == [
        "2 rows contain text that the tokenizer does not know (4 tokens are '<pad>' or '<unk>'): rows 2, 5"
    ]


def test_a_tokenizer_that_is_too_large_is_found_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(scale=1.0).save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"word{n}" for n in range(20)])
    tokenizer.save_pretrained(tmp_path / "model")
    assert cli.run(["check", str(write_recipe(tmp_path, tmp_path / "model"))]) == 2
    assert f"the tokenizer has {len(tokenizer)} tokens, but the model has only 64" in capsys.readouterr().err


@VERBS
def test_an_adversary_with_earlier_turns_only(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `train_on: all` a row may have demonstrated turns, but none that rollouts are compared with."""
    turns = [("user", "say a."), ("assistant", "aaa"), ("user", "say b."), ("assistant", "bbb")]
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
    messages[-1]["weight"] = 0
    data = tmp_path / "turns.jsonl"
    data.write_text(json.dumps({"messages": messages, "letter": "b"}) + "\n")
    template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    model = save_model(tmp_path / "model", chat_template=template)
    path = write_recipe(tmp_path, model, data={"path": str(data), "train_on": "all"})
    assert cli.run([verb, str(path)]) == 2
    assert "compares completions with demonstrations, but no row has a" in capsys.readouterr().err
