"""Launcher settings that FSDP2 supports, and stages that it does not."""

import pytest

from uniapl.config import Config
from uniapl.config.resolve import resolve
from uniapl.errors import UsageError
from uniapl.training.distributed.fsdp import check_launch, check_sharding, shards_weights


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch` with recipes/accelerate/fsdp2.yaml sets it, in two processes."""
    for name, value in {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)


def test_fsdp2_is_taken() -> None:
    check_launch()
    assert shards_weights()


def test_one_process_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_launch()
    assert not shards_weights()


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed: use .* FSDP2.*--fsdp_version 2"),
        ("FSDP_VERSION", "1", "set fsdp_version to 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: set it to false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "optim.gradient_checkpointing"),
    ],
)
def test_what_else_a_launcher_asks_for_is_refused(
    variable: str, value: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=remedy):
        check_launch()


def config(method: str, **changes: object) -> Config:
    required = {"output_dir": "run", "method": method, "data": {"path": "rows.jsonl"}}
    return resolve(required | {"model": {"model_name_or_path": "model"}} | changes).config


def test_adapters_are_for_ddp() -> None:
    model = {"model_name_or_path": "model", "lora_r": 4}
    check_sharding(config("uniapl"))
    with pytest.raises(UsageError, match=r"model\.lora_r .* torchrun"):
        check_sharding(config("grpo", model=model))
    discriminator = {"discriminator": {"lora_r": 4}}
    with pytest.raises(UsageError, match=r"discriminator\.lora_r .* torchrun"):
        check_sharding(config("uniapl", **discriminator))
