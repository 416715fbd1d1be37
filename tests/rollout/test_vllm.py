"""Rollouts from a fake vLLM: weights per step, the canary, deadlines, a server that dies, complete runs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import uniapl
from support.fake_vllm import FakeServer, FakeVLLM, behind, install, serving
from support.runs import evaluated, lines, recipe, run_until, timeless, train, write_recipe
from support.tiny import save_model
from uniapl import cli
from uniapl.rollout import engines
from uniapl.rollout.vllm import MAX_RESTARTS


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "PAUSE", 0.02)
    # The fake accepts the seeds of the local sampler, so that both sample alike.
    monkeypatch.setattr(engines, "SEEDS", 2**63)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    """A server that starts with another model than the trained one."""
    with serving(FakeServer(save_model(tmp_path / "theirs", seed=9))) as fake:
        yield fake


def texts(run: Path) -> list[Any]:
    records = lines(run / "completions.jsonl")
    return [[(c["text"], c["tokens"]) for c in record["completions"]] for record in records]


def test_every_step_is_sampled_with_its_own_weights(
    model_dir: Path, tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colocated and behind a server: the same completions as from the trainer's own weights."""
    started = install(monkeypatch)
    suite = evaluated(tmp_path, num_samples=2, max_completion_length=9)
    train(recipe(model_dir, tmp_path / "local", **suite))
    train(recipe(model_dir, tmp_path / "colocated", rollout={"sampler": "vllm", "temperature": 1.0}, **suite))
    train(recipe(model_dir, tmp_path / "server", rollout=behind(server), **suite))
    local = lines(tmp_path / "local" / "metrics.jsonl")
    assert local[0]["trained/importance_sampling_ratio/mean"] is None
    for name in ("colocated", "server"):
        assert texts(tmp_path / name) == texts(tmp_path / "local")
        for record, expected in zip(lines(tmp_path / name / "metrics.jsonl"), local, strict=True):
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-5)
            assert record["trained/sampling_logp_difference/max"] < 1e-4
            assert record["trained/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
            scores = {key: value for key, value in expected.items() if key.startswith("eval/")}
            assert ("eval/held_out/mean_length" in scores) == (record["step"] in (2, 4))
            assert {key: record[key] for key in scores} == scores
        assert not (tmp_path / name / "weights-for-vllm").exists()
    # Before training, in each of the four steps, and for the evaluation after the last one. Step 3 samples
    # with the weights that were sent for the evaluation after step 2.
    assert server.loads == 6
    (engine,) = started
    assert engine.loads == 5, "it was started with the first weights"
    longest = len("say eeee.")
    assert engine.settings["max_model_len"] == longest + 9, "of the suite"
    assert engine.settings["logprobs_mode"] == "processed_logprobs"
    assert engine.settings["dtype"] == "float32"


def test_a_cool_sampler_reports_what_the_trainer_computes(
    model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    train(recipe(model_dir, tmp_path / "run", rollout=behind(server, temperature=0.6)))
    for record in lines(tmp_path / "run" / "metrics.jsonl"):
        assert record["trained/sampling_logp_difference/max"] < 1e-4


WARPED = {
    **{"top_k": 9, "min_p": 0.02, "repetition_penalty": 1.3, "temperature": 1.0},
    "stop_strings": ["a", "bc", "."],
}


def test_sampling_settings_apply_alike(
    model_dir: Path, tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same completions in training and evaluation, with the policy's log-probabilities."""
    started = install(monkeypatch)
    suite = evaluated(tmp_path, num_samples=2, max_completion_length=9, top_p=0.9, repetition_penalty=0.8)
    server.raw = True
    for name, where in {"local": {}, "colocated": {"sampler": "vllm"}, "server": behind(server)}.items():
        train(recipe(model_dir, tmp_path / name, rollout=WARPED | where, **suite))
    local = lines(tmp_path / "local" / "metrics.jsonl")
    ends = [c for r in lines(tmp_path / "local" / "completions.jsonl") for c in r["completions"]]
    assert any(c["text"][-1:] in ("a", ".") or c["text"][-2:] == "bc" for c in ends)
    for name in ("colocated", "server"):
        assert texts(tmp_path / name) == texts(tmp_path / "local")
        for record, expected in zip(lines(tmp_path / name / "metrics.jsonl"), local, strict=True):
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-5)
            assert record["trained/sampling_logp_difference/max"] < 1e-4
            assert record["trained/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
            scores = {key: value for key, value in expected.items() if key.startswith("eval/")}
            assert {key: record[key] for key in scores} == scores
    (engine,) = started
    assert engine.settings["logprobs_mode"] == "raw_logprobs"
    assert engine.reads_text, "vLLM finds stop strings in decoded text"


def test_a_server_that_reports_warped_log_probabilities_is_refused(
    model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    values = recipe(model_dir, tmp_path / "run", rollout=WARPED | behind(server))
    with pytest.raises(uniapl.UsageError, match="A server needs --logprobs-mode raw_logprobs"):
        train(values)


def test_weights_that_were_not_taken_end_the_run(model_dir: Path, tmp_path: Path, server: FakeServer) -> None:
    """From the second step on the server ignores new weights: no rollout is sampled with old ones."""
    values = recipe(model_dir, tmp_path / "run", save_steps=1, rollout=behind(server))

    def reward(completions: list[str], letter: list[str]) -> list[float]:
        server.deaf = server.loads > 1
        return [float(len(text)) for text in completions]

    said = r"weights sent after step \d: .*\d nats per token.*--resume auto"
    with pytest.raises(uniapl.UniAPLError, match=said):
        train(values, reward_functions=[reward])
    server.deaf = False
    assert train(values | {"resume": "auto"}).steps == 4


@pytest.mark.parametrize("fault", ["deaf", "raw"])
def test_what_does_not_work_is_heard_before_training(
    fault: str, model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    """A server that ignores new weights, or reports log-probabilities of another temperature."""
    setattr(server, fault, True)
    values = recipe(model_dir, tmp_path / "run", rollout=behind(server, temperature=0.5))
    with pytest.raises(uniapl.UsageError, match=r"sent before the first step: .* --logprobs-mode"):
        train(values)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_server_that_comes_back_is_sent_the_weights_again(
    model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    """It dies while sampling in steps 1 and 3 and restarts with its own weights: the results are the same."""
    train(recipe(model_dir, tmp_path / "whole", rollout=behind(server)))
    loads = server.loads
    server.asked.clear()
    server.dies_at, server.gone_for = {4, 14}, 3
    train(recipe(model_dir, tmp_path / "shaken", rollout=behind(server)))
    whole, shaken = (timeless(lines(tmp_path / name / "metrics.jsonl")) for name in ("whole", "shaken"))
    assert shaken == whole
    assert server.loads - loads == loads + 2


def test_a_server_that_dies_in_every_try_ends_the_run(
    model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    server.dies_at = set(range(8, 100))
    values = recipe(model_dir, tmp_path / "run", save_steps=1, rollout=behind(server))
    said = rf"vLLM was lost {MAX_RESTARTS + 1} times: {server.url}/v1/completions: .*--resume auto"
    with pytest.raises(uniapl.UniAPLError, match=said):
        train(values)
    # With the server running again, the run continues to the same result.
    server.dies_at = set()
    train(values | {"resume": "auto"})
    train(values | {"output_dir": str(tmp_path / "whole")})
    whole, broken = (timeless(lines(tmp_path / name / "metrics.jsonl")) for name in ("whole", "run"))
    assert broken == whole


def test_a_server_that_stays_away_ends_the_run_in_bounded_time(
    model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    server.dies_at, server.gone_for = {8}, 10**6
    values = recipe(model_dir, tmp_path / "run", rollout=behind(server, vllm_timeout=1.0))
    started = time.monotonic()
    said = r"did not come up within rollout.vllm_timeout 1 s: .*--resume auto"
    with pytest.raises(uniapl.UniAPLError, match=said):
        train(values)
    assert time.monotonic() - started < 60, "the deadline applies"


def test_a_server_that_hangs_ends_the_run(model_dir: Path, tmp_path: Path, server: FakeServer) -> None:
    server.hangs = True
    values = recipe(model_dir, tmp_path / "run", rollout=behind(server, vllm_timeout=0.3))
    with pytest.raises(uniapl.UsageError, match=r"lost 4 times: .*(ReadTimeout|within 0.3 s)"):
        train(values)


def test_a_server_without_its_development_endpoints(
    model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    server.refuses = True
    values = recipe(model_dir, tmp_path / "run", rollout=behind(server))
    with pytest.raises(uniapl.UsageError, match=r"rejects /collective_rpc: .*VLLM_SERVER_DEV_MODE=1"):
        train(values)


def test_a_server_that_is_not_there(model_dir: Path, tmp_path: Path, server: FakeServer) -> None:
    nowhere = behind(server, vllm_server_base_url="http://127.0.0.1:9", vllm_timeout=0.1)
    with pytest.raises(uniapl.UsageError, match=r"http://127.0.0.1:9 did not come up"):
        train(recipe(model_dir, tmp_path / "run", rollout=nowhere))


def test_a_colocated_engine_that_hangs_or_fails(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    settings = {"sampler": "vllm", "vllm_timeout": 0.3}

    def hangs(self: FakeVLLM, *_: Any) -> Any:
        time.sleep(3)

    def fails(self: FakeVLLM, *_: Any) -> Any:
        raise RuntimeError("EngineDeadError")

    for broken, said in ((hangs, "no answer within rollout.vllm_timeout 0.3 s"), (fails, "EngineDeadError")):
        monkeypatch.setattr(FakeVLLM, "answer", broken)
        with pytest.raises(uniapl.UniAPLError, match=said):
            train(recipe(model_dir, tmp_path / "run", rollout=settings))


def test_answers_of_another_form_are_refused(
    model_dir: Path, tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = FakeVLLM.answer
    for broken in (
        lambda self, prompt, asked: whole(self, prompt, asked | {"max_tokens": asked["max_tokens"] + 1}),
        lambda self, prompt, asked: list(whole(self, prompt, asked))[1:],
    ):
        monkeypatch.setattr(FakeVLLM, "answer", broken)
        with pytest.raises(uniapl.UsageError, match="malformed completions"):
            train(recipe(model_dir, tmp_path / "run", rollout=behind(server)))


def test_settings_that_cannot_work(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2 with the remedy, from `uniapl check` already."""
    path = str(write_recipe(tmp_path, model_dir))
    for flags, said in {
        "--rollout.sampler vllm": "pip install 'uniapl[vllm]'",
        "--rollout.sampler vllm --rollout.min-p 0.1 --rollout.temperature 0.7": "need rollout.temperature 1",
        "--rollout.sampler vllm --rollout.vllm-mode server --rollout.vllm-server-base-url x": "invalid URL",
        "--use-vllm True": "did you mean '--rollout.sampler'",
    }.items():
        assert cli.run(["check", path, *flags.split()]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_memory_counts_the_engine_instead_of_the_local_cache(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A colocated engine takes its fraction of the free memory, a server none."""
    install(monkeypatch)
    path = str(write_recipe(tmp_path, model_dir))
    found: dict[str, dict[str, Any]] = {}
    for name, flags in {
        "local": "",
        "colocate": "--rollout.sampler vllm --rollout.vllm-gpu-memory-utilization 0.25",
        "server": "--rollout.sampler vllm --rollout.vllm-mode server",
    }.items():
        assert cli.run(["check", path, "--json", *flags.split()]) == 0
        (found[name],) = json.loads(capsys.readouterr().out)["memory"]
    assert "rollout" in found["local"]["passes"]
    for name in ("colocate", "server"):
        assert "rollout" not in found[name]["passes"]
    assert "vllm" not in found["server"]["stays"]
    colocated = found["colocate"]
    assert colocated["stays"]["vllm"] == pytest.approx(0.25 * colocated["available"], rel=0.2)


def test_a_killed_run_resumes_to_the_same_result(model_dir: Path, tmp_path: Path, server: FakeServer) -> None:
    """As exactly as the sampler is deterministic: the fake is, vLLM on a GPU is not."""
    whole, broken = (
        recipe(model_dir, tmp_path / name, rollout=behind(server)) for name in ("whole", "broken")
    )
    train(whole)
    run_until(3, broken)
    train(broken | {"resume": "auto"})
    assert timeless(lines(tmp_path / "broken" / "metrics.jsonl")) == timeless(
        lines(tmp_path / "whole" / "metrics.jsonl")
    )


@pytest.mark.distributed
def test_two_processes_speak_through_one(
    model_dir: Path, tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts on two ranks: the completions of one process; the weights are sent once per step."""
    # The other ranks do not run this file's fixtures.
    monkeypatch.setattr(engines, "SEEDS", 2**62)
    path = write_recipe(tmp_path, model_dir, max_steps=2, **evaluated(tmp_path))
    values = yaml.safe_load(path.read_text())
    # A low temperature makes models with small random weights distinguishable.
    rollout = values["rollout"] | behind(server, temperature=0.3)
    path.write_text(yaml.safe_dump(values | {"rollout": rollout}))
    arguments = ["-m", "uniapl.cli", "train", str(path), "--output-dir"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", *rendezvous]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert cli.run([*arguments[2:], str(tmp_path / "one")]) == 0
    before = server.loads
    command = [sys.executable, *launcher, *arguments, str(tmp_path / "two")]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert server.loads - before == 4, "before training, in each step, and for the evaluation after the last"
    assert texts(tmp_path / "two") == texts(tmp_path / "one")
    one, two = (lines(tmp_path / name / "metrics.jsonl")[1] for name in ("one", "two"))
    scores = {key: value for key, value in one.items() if key.startswith("eval/held_out/")}
    assert len(scores) == 4
    assert {key: two[key] for key in scores} == scores
    server.load(str(server.directory))
    server.deaf = True
    command = [sys.executable, *launcher, *arguments, str(tmp_path / "deaf")]
    ended = subprocess.run(command, capture_output=True, env=environment, text=True, timeout=120)
    assert ended.returncode != 0
    assert "sent before the first step" in ended.stderr
