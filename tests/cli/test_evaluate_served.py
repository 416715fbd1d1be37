"""`uniapl evaluate` with a vLLM server (a fake one) that was started with the model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.fake_vllm import FakeServer, serving
from support.runs import lines
from support.tiny import save_model
from uniapl import cli
from uniapl.rollout import engines

PROMPTS = ["say a.", "hello", "a", "Any words, or none"]


@pytest.fixture(autouse=True)
def as_locally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "PAUSE", 0.02)
    # The fake accepts the seeds of the local sampler, so that both sample alike.
    monkeypatch.setattr(engines, "SEEDS", 2**63)


@pytest.fixture
def server(model_dir: Path) -> Iterator[FakeServer]:
    with serving(FakeServer(model_dir)) as fake:
        yield fake


def evaluate(model: Path, out: Path, *flags: str) -> int:
    suite = out.parent / "suite.jsonl"
    suite.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    words = [str(model), "--suites", str(suite), "--rewards", "no_comma", "--output-dir", str(out)]
    return cli.run(["evaluate", *words, "--max-completion-length", "12", *flags])


def served(server: FakeServer, *flags: str) -> list[str]:
    url = ["--vllm-server-base-url", f"{server.url}/", "--vllm-timeout", "120"]
    return ["--sampler", "vllm", "--vllm-mode", "server", *url, *flags]


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--num-samples", "3", "--temperature", "0.7", "--stop-strings", "bj", "e"],
        ["--repetition-penalty", "1.3", "--top-k", "5", "--num-samples", "2"],
    ],
)
def test_a_server_gives_the_results_of_the_local_sampler(
    flags: list[str], model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    """Every completion and score; the server's weights are never changed."""
    assert evaluate(model_dir, tmp_path / "local", *flags) == 0
    assert evaluate(model_dir, tmp_path / "served", *flags, *served(server)) == 0
    assert lines(tmp_path / "served" / "completions.jsonl") == lines(tmp_path / "local" / "completions.jsonl")
    ours, theirs = results(tmp_path / "served"), results(tmp_path / "local")
    assert ours["suites"] == theirs["suites"]
    assert (ours["settings"].pop("sampler"), theirs["settings"].pop("sampler")) == ("vllm", "local")
    assert ours["settings"] == theirs["settings"]
    note = ours["notes"][0]
    assert note.startswith(
        f"completions come from the vLLM server {server.url}, started with '{model_dir}'; "
    )
    difference = float(note.split("differ from the model's by ")[1].split()[0])
    assert 0 <= difference < 1e-5
    assert ours["notes"][1:] == theirs["notes"]
    assert set(server.asked) == {"/health", "/v1/models", "/v1/completions"}
    assert server.loads == 0


def test_a_server_with_another_model_is_refused(
    model_dir: Path, tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_model(tmp_path / "other", seed=1)
    assert evaluate(other, tmp_path / "out", *served(server)) == 2
    error = capsys.readouterr().err
    assert f"started with '{model_dir}', has another model: its log-probabilities differ by 0." in error
    assert "and rollout.vllm_max_logp_difference is 0.05. Start `vllm serve` with the model" in error
    assert not (tmp_path / "out").exists()
    assert evaluate(other, tmp_path / "out", *served(server, "--vllm-max-logp-difference", "5")) == 0


def test_a_server_that_dies_is_asked_again(model_dir: Path, tmp_path: Path, server: FakeServer) -> None:
    assert evaluate(model_dir, tmp_path / "whole", *served(server)) == 0
    requests = server.asked.count("/v1/completions")
    assert requests == 4 + 4, "the canary has up to eight prompts, and the suite has four"
    server.dies_at, server.gone_for = {requests + 4 + 2}, 3
    assert evaluate(model_dir, tmp_path / "again", *served(server)) == 0
    ours, theirs = (lines(tmp_path / name / "completions.jsonl") for name in ("again", "whole"))
    assert ours == theirs


def test_a_server_that_comes_back_with_another_model_ends_the_evaluation(
    model_dir: Path, tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.directory = save_model(tmp_path / "other", seed=1)
    server.dies_at = {6}
    assert evaluate(model_dir, tmp_path / "out", *served(server)) == 1
    assert "has another model: its log-probabilities differ by 0." in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


def test_flags_that_cannot_work(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = "--sampler vllm"
    for flags, said in {
        f"{server} --vllm-mode colocate": "--vllm-mode colocate: evaluation uses a running server",
        "--vllm-timeout 3": "--vllm-timeout has no effect without --sampler vllm",
        "--sampler nccl": "rollout.sampler",
        f"{server} --vllm-server-base-url x": "rollout.vllm_server_base_url: invalid URL 'x'",
        f"{server} --vllm-server-base-url http://127.0.0.1:9 --vllm-timeout 0.1": (
            "http://127.0.0.1:9 did not come up within rollout.vllm_timeout 0.1 s"
        ),
    }.items():
        assert evaluate(model_dir, tmp_path / "out", *flags.split()) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
