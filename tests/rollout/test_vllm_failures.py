"""Failures around rollouts from vLLM: full disks, memory, the URL, a later stage."""

import json
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import uniapl
from support.fake_vllm import FakeServer, behind, send, serving
from support.runs import lines, recipe, train, write_recipe
from support.tiny import make_model, save_model
from uniapl import cli
from uniapl.rollout import engines
from uniapl.training.checkpoint import disk as storage

NOWHERE = {"vllm_server_base_url": "http://127.0.0.1:9", "vllm_timeout": 0.1}
WHOLE = sum(parameter.nbytes for parameter in make_model().parameters())
"""Bytes of the model that is trained."""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "PAUSE", 0.02)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with serving(FakeServer(save_model(tmp_path / "theirs", seed=9))) as fake:
        yield fake


@pytest.fixture
def fill_disk() -> Iterator[Callable[[], None]]:
    """After it is called, no file can grow as large as the model."""
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (WHOLE // 2, limits[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


FULL = r"the weights for vLLM cannot be written to '.*weights-for-vllm': .*os error 27.*--output-dir"


def test_a_disk_that_is_full_before_training(
    model_dir: Path, tmp_path: Path, server: FakeServer, fill_disk: Callable[[], None]
) -> None:
    fill_disk()
    with pytest.raises(uniapl.UsageError, match=FULL):
        train(recipe(model_dir, tmp_path / "run", rollout=behind(server)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps", [0, 1])
def test_a_disk_that_fills_up_mid_run(
    steps: int, model_dir: Path, tmp_path: Path, server: FakeServer, fill_disk: Callable[[], None]
) -> None:
    def reward(completions: list[str], letter: list[str]) -> list[float]:
        if server.loads == 2:
            fill_disk()
        return [float(len(text)) for text in completions]

    values = recipe(
        model_dir, tmp_path / "run", save_steps=9, rollout=behind(server, max_off_policy_steps=steps)
    )
    with pytest.raises(uniapl.UniAPLError, match=FULL + r".*--resume auto") as raised:
        train(values | {"rewards": {"timeout": None}}, reward_functions=[reward])
    assert not isinstance(raised.value, uniapl.UsageError)
    assert not (tmp_path / "run" / "weights-for-vllm").exists()


class Enough(Exception):
    """Ends a run as soon as the test has its number."""


def room(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of disk space that a run requires."""
    asked: list[int] = []

    def note(run_dir: Path, needed: int) -> None:
        asked.append(needed)
        raise Enough

    monkeypatch.setattr(storage, "check_space", note)
    with pytest.raises(Enough):
        train(values)
    return asked[0]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_disk_space_for_the_weights_that_are_sent(
    lora: bool,
    bf16: bool,
    model_dir: Path,
    tmp_path: Path,
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An adapter is merged before it is sent; with bf16 training a weight takes two bytes."""
    model = {"lora_r": 1} if lora else {}
    values = recipe(model_dir, tmp_path / "run", model=model, optim={"bf16": bf16})
    rollout = values["rollout"] | behind(server, vllm_max_logp_difference=5.0)
    more = room(values | {"rollout": rollout}, monkeypatch) - room(values, monkeypatch)
    assert more == WHOLE // (2 if bf16 else 1)


def test_disk_space_for_pending_rollouts(
    model_dir: Path, tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of up to two checkpoints on the disk: 3 prompts, 4 completions of 6 tokens."""
    values = [
        recipe(model_dir, tmp_path / "run", rollout=behind(server, max_off_policy_steps=steps))
        for steps in (1, 0)
    ]
    ahead, plain = (room(v, monkeypatch) for v in values)
    assert ahead - plain == 2 * 3 * 4 * 6 * 32


def test_memory_for_merging(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A merged copy and one in bf16, both on the CPU; a model that is sent unchanged needs no copy."""
    path = str(write_recipe(tmp_path, model_dir))
    vllm = "--rollout.sampler vllm --rollout.vllm-mode server"
    for flags, expected in {
        vllm: None,
        f"{vllm} --model.lora-r 1": WHOLE,
        f"{vllm} --model.lora-r 1 --optim.bf16 True": 1.5 * WHOLE,
    }.items():
        assert cli.run(["check", path, "--json", *flags.split()]) == 0
        (memory,) = json.loads(capsys.readouterr().out)["memory"]
        assert memory["passes"].get("weights for vLLM") == expected


def test_tied_weights_are_sent_once(model_dir: Path, tmp_path: Path, server: FakeServer) -> None:
    sent: list[dict[str, torch.Tensor]] = []
    load = server.load

    def look(directory: str) -> None:
        sent.append(load_file(Path(directory) / "model.safetensors"))
        load(directory)

    server.load = look  # type: ignore[method-assign]
    rollout = behind(server, vllm_max_logp_difference=5.0)
    train(recipe(model_dir, tmp_path / "run", max_steps=1, rollout=rollout, optim={"bf16": True}))
    for state in sent:
        assert "lm_head.weight" not in state
        assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
        assert sum(tensor.nbytes for tensor in state.values()) == WHOLE // 2


def test_a_slash_at_the_end_of_the_address(model_dir: Path, tmp_path: Path, server: FakeServer) -> None:
    """Also while waiting for a lost server."""
    asked: set[str] = set()
    respond = server.respond

    def look(handler: Any, body: Any) -> None:
        # The path as sent; the handler normalises its own.
        asked.add(handler.requestline.split()[1])
        respond(handler, body)

    server.respond = look  # type: ignore[method-assign]
    server.dies_at, server.gone_for = {8}, 2
    rollout = behind(server, vllm_server_base_url=f"{server.url}/")
    assert train(recipe(model_dir, tmp_path / "run", rollout=rollout)).steps == 4
    assert asked == {"/collective_rpc", "/reset_prefix_cache", "/v1/completions", "/health"}


def test_an_address_with_the_path_of_the_answers(model_dir: Path, tmp_path: Path, server: FakeServer) -> None:
    for end in ("/v1", "/v1/"):
        rollout = behind(server, vllm_server_base_url=server.url + end, vllm_timeout=1.0)
        with pytest.raises(uniapl.UsageError, match="leave out /v1"):
            train(recipe(model_dir, tmp_path / "run", rollout=rollout))


def test_a_server_that_does_not_see_the_directory(
    model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    respond = server.respond

    def blind(handler: Any, body: Any) -> None:
        if handler.path == "/collective_rpc":
            send(handler, {"error": {"message": "Internal Server Error"}}, 500)
        else:
            respond(handler, body)

    server.respond = blind  # type: ignore[method-assign]
    said = r"/collective_rpc: status 500.*must see the run's directory under the same path"
    with pytest.raises(uniapl.UsageError, match=said):
        train(recipe(model_dir, tmp_path / "run", rollout=behind(server)))


def staged(model_dir: Path, output: Path, **rollout: Any) -> dict[str, Any]:
    """Two steps on demonstrations, then two with rollouts from vLLM."""
    stages = [
        {"method": "sft", "max_steps": 2},
        {"method": "grpo", "max_steps": 2, "rollout": {"sampler": "vllm", "vllm_mode": "server"} | rollout},
    ]
    return recipe(model_dir, output, stages=stages)


def test_colocated_in_several_processes_is_refused_before_the_first_stage(
    model_dir: Path, tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_installed", lambda name: True)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(uniapl.UsageError, match=r"rollout.vllm_mode 'colocate' is for one process"):
        train(staged(model_dir, tmp_path / "run", vllm_mode="colocate"))
    assert not (tmp_path / "run").exists()


def test_a_later_stage_without_its_server_can_be_resumed(
    model_dir: Path, tmp_path: Path, server: FakeServer
) -> None:
    run = tmp_path / "run"
    said = r"stage 2: .*http://127.0.0.1:9 did not come up.*--resume auto"
    with pytest.raises(uniapl.UniAPLError, match=said) as raised:
        train(staged(model_dir, run, **NOWHERE))
    assert not isinstance(raised.value, uniapl.UsageError)
    assert len(lines(run / "metrics.jsonl")) == 2
    assert train(staged(model_dir, run, **behind(server)) | {"resume": "auto"}).steps == 4


def test_what_has_ended_needs_no_server(model_dir: Path, tmp_path: Path, server: FakeServer) -> None:
    """A complete run is not resumed; an incomplete one needs its server."""
    values = recipe(model_dir, tmp_path / "run", max_steps=2, rollout=behind(server))
    train(values)
    gone = values | {"rollout": values["rollout"] | NOWHERE, "resume": "auto"}
    assert train(gone).steps == 2
    with pytest.raises(uniapl.UsageError, match="did not come up"):
        train(gone | {"max_steps": 3})
