"""`uniapl export --push-to-hub`, against a stand-in for the Hub: which files it gets, and what is refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from transformers import AutoModelForCausalLM

from support.fake_hub import FakeHub, serving
from support.runs import recipe, train
from support.tiny import save_model
from uniapl import cli

MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(FakeHub(), monkeypatch) as fake:
        yield fake


@pytest.fixture(scope="module")
def run(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    train(recipe(model_dir, path, max_steps=2))
    return path


@pytest.fixture(scope="module")
def adapter(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "adapter"
    train(recipe(model_dir, path, max_steps=1, method="sft", model={"lora_r": 2}))
    return path


def contents(directory: Path, names: set[str]) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in names}


def card_of(files: dict[str, bytes]) -> tuple[dict[str, object], str]:
    """The metadata and the text of a card."""
    _, front, text = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_model_the_tokenizer_and_the_card_of_a_run_are_uploaded(
    run: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no optimizer state, checkpoint, completion, metric log or file of the user."""
    (run / "final" / "notes.txt").write_text("not for others")
    before = sorted((file, file.stat().st_mtime_ns) for file in run.rglob("*"))
    assert cli.run(["export", str(run), "--push-to-hub", "primes"]) == 0
    files = hub.files["ann/primes"]
    assert files.keys() == MODEL | TOKENIZER
    others = (MODEL | TOKENIZER) - {"README.md"}
    assert {name: files[name] for name in others} == contents(run / "final", others)
    card = (run / "final" / "README.md").read_text()
    assert card.count('from_pretrained("PATH")') == 2
    assert files["README.md"].decode() == card.replace('"PATH"', '"ann/primes"')
    assert hub.repositories == {"ann/primes": False}
    assert sorted((file, file.stat().st_mtime_ns) for file in run.rglob("*")) == before
    out = capsys.readouterr().out
    assert out == f"uploaded {', '.join(sorted(MODEL | TOKENIZER))} to {hub.url}/ann/primes\n"


def test_of_a_checkpoint_only_the_model_is_uploaded(run: Path, hub: FakeHub) -> None:
    checkpoint = run / "checkpoints" / "step-000002"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"policy_optimizer.safetensors", "discriminator.safetensors", "state.json"} < names
    assert cli.run(["export", str(checkpoint), "--push-to-hub", "ann/primes"]) == 0
    assert hub.files["ann/primes"].keys() == MODEL | TOKENIZER
    _, text = card_of(hub.files["ann/primes"])
    assert "uniapl, 2 steps, seed 0." in text


def test_an_edited_card_is_uploaded(run: Path, hub: FakeHub, tmp_path: Path) -> None:
    shutil.copytree(run / "final", tmp_path / "final")
    (tmp_path / "final" / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    assert cli.run(["export", str(tmp_path / "final"), "--push-to-hub", "primes"]) == 0
    assert hub.files["ann/primes"]["README.md"] == b"---\nlicense: mit\n---\nMine.\n"


def test_a_merged_model_is_uploaded_with_its_own_card(
    adapter: Path, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    words = ["export", str(adapter), "-o", str(out), "--dtype", "bfloat16", "--push-to-hub", "primes"]
    assert cli.run([*words, "--hub-private-repo"]) == 0
    assert hub.repositories == {"ann/primes": True}
    files = hub.files["ann/primes"]
    assert files.keys() == MODEL | TOKENIZER
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    front, text = card_of(files)
    assert front["library_name"] == "transformers"
    assert "A LoRA adapter of rank 2 was trained and merged into model" in text
    assert 'model = AutoModelForCausalLM.from_pretrained("ann/primes")' in text
    assert "peft" not in text
    assert 'AutoModelForCausalLM.from_pretrained("PATH")' in (out / "README.md").read_text()
    assert capsys.readouterr().out.startswith(f"wrote the model of {adapter / 'final'} to {out}, with its")


def test_an_adapter_of_a_hub_model_is_uploaded_as_it_is(
    model_dir: Path, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is found by its name while the run trains; on the Hub it is a model, not a directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, tmp_path / "org" / "base")
    values = recipe(Path("org/base"), tmp_path / "run", max_steps=1, method="sft", model={"lora_r": 2})
    train(values)
    shutil.rmtree(tmp_path / "org")
    assert cli.run(["export", "run", "--push-to-hub", "primes"]) == 0
    files = hub.files["ann/primes"]
    assert files.keys() == ADAPTER | TOKENIZER
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"


def test_a_failed_upload_leaves_the_model_and_says_how_to_repeat_it(
    run: Path, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuses_commits = True
    out = tmp_path / "out"
    assert cli.run(["export", str(run), "-o", str(out), "--push-to-hub", "primes"]) == 1
    error = capsys.readouterr().err
    assert "error: the upload to 'ann/primes' failed: HfHubHTTPError: " in error
    assert "exceeded your storage limit" in error
    assert f"The model is complete in '{out}'; `uniapl export {out} --push-to-hub ann/primes`" in error
    assert AutoModelForCausalLM.from_pretrained(out)
    hub.refuses_commits = False
    assert cli.run(["export", str(out), "--push-to-hub", "ann/primes"]) == 0
    assert hub.files["ann/primes"].keys() == MODEL | TOKENIZER


def test_what_cannot_be_uploaded_is_refused_before_a_model_is_written(
    run: Path, adapter: Path, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["ann/public"] = False
    plain = save_model(tmp_path / "plain")
    out = ["-o", str(tmp_path / "out")]
    refused = "It needs a token with write access (`hf auth login`, or HF_TOKEN in the environment)"
    cases = [
        ([str(run)], "nothing to do: give -o DIRECTORY, --push-to-hub USER/NAME, or both"),
        (
            [str(run), "--push-to-hub", "x", "--dtype", "float16"],
            "--dtype converts the weights that -o writes",
        ),
        ([str(run), *out, "--hub-private-repo"], "--hub-private-repo needs --push-to-hub USER/NAME"),
        ([str(run), *out, "--push-to-hub", "bob/x"], refused),
        ([str(run), *out, "--push-to-hub", "a/b/c"], refused),
        (
            [str(run), *out, "--push-to-hub", "public", "--hub-private-repo"],
            "'ann/public' exists and is public",
        ),
        ([str(plain), "--push-to-hub", "x"], f"'{plain}' has no manifest.json"),
        ([str(adapter), "--push-to-hub", "x"], "which other users do not have: add -o DIRECTORY"),
        ([str(run), "-o", str(plain), "--push-to-hub", "x"], "already exists: choose another directory"),
    ]
    for words, said in cases:
        assert cli.run(["export", *words]) == 2
        assert said in capsys.readouterr().err
    assert hub.repositories == {"ann/public": False}
    assert hub.files == {}
    assert not (tmp_path / "out").exists()


def test_without_a_login_or_a_connection_nothing_is_written(
    run: Path,
    hub: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["export", str(run), "-o", str(tmp_path / "out"), "--push-to-hub", "primes"]
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_stranger")
    assert cli.run(words) == 2
    assert "--push-to-hub 'primes': HfHubHTTPError: " in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    asked = len(hub.asked)
    assert cli.run(words) == 2
    assert "--push-to-hub 'primes': LocalTokenNotFoundError: " in capsys.readouterr().err
    assert len(hub.asked) == asked
    monkeypatch.setenv("HF_TOKEN", "hf_of_ann")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert cli.run(words) == 2
    assert "--push-to-hub 'primes': ConnectError: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
