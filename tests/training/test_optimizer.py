"""Which parameters decay, the learning rate of each step, and optimizer states in checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.testing import assert_close
from transformers import Trainer, get_scheduler

import uniapl
from support.adapters import policy_model, settings
from support.runs import assert_same_run, lines, recipe, run_until, train
from support.tiny import CONFIGS, letter_rows, make_model
from uniapl.config import OptimConfig
from uniapl.config.resolve import resolve
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.checkpoint.directory import load_optimizer, save_optimizer
from uniapl.training.optimizer import adamw, check_schedule, learning_rates

RATE, DECAY = 1e-3, 100.0


def decay_of(optimizer: AdamW) -> dict[str, float]:
    return {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}


@pytest.mark.parametrize("family", [*CONFIGS, "lora"])
def test_the_parameters_that_decay_are_those_of_transformers(family: str, model_dir: Path) -> None:
    model: Any = policy_model(settings(model_dir)) if family == "lora" else make_model(family)
    trainer: Any = Trainer
    decaying = trainer.get_decay_parameter_names(None, model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    decays = decay_of(adamw(model, weight_decay=0.1, lr=RATE))
    assert decays == {name: 0.1 if name in decaying else 0.0 for name in trained}
    still = {name for name, decay in decays.items() if decay == 0}
    assert still == {name for name in trained if model.get_parameter(name).dim() == 1}


@pytest.mark.case(12)
def test_one_step_decays_matrices_only(model_dir: Path, tmp_path: Path) -> None:
    """AdamW's decay is -rate x decay x weight, in addition to the same update."""
    start = load_file(model_dir / "model.safetensors")
    for name, decay in (("without", 0.0), ("with", DECAY)):
        optim = {"learning_rate": RATE, "weight_decay": decay}
        train(recipe(model_dir, tmp_path / name, method="sft", max_steps=1, optim=optim))
    ours, theirs = (
        load_file(tmp_path / name / "final" / "model.safetensors") for name in ("with", "without")
    )
    norms = [name for name in start if start[name].dim() == 1]
    assert len(norms) == 9
    for name in start:
        expected = theirs[name] if name in norms else theirs[name] - RATE * DECAY * start[name]
        assert_close(ours[name], expected, atol=1e-6, rtol=0, msg=name)


def test_one_step_decays_the_discriminator_s_matrices_only(model_dir: Path, tmp_path: Path) -> None:
    for name, decay in (("without", 0.0), ("with", DECAY)):
        discriminator = {"learning_rate": RATE, "weight_decay": decay, "updates_per_step": 1}
        values = recipe(model_dir, tmp_path / name, max_steps=1, discriminator=discriminator)
        result = train(values, train_dataset=letter_rows(demonstrated=range(12)))
        assert result.metrics["discriminator/updates"] == 1
    ours, theirs = (
        load_file(checkpoint.checkpoint_path(tmp_path / name, 1) / "discriminator.safetensors")
        for name in ("with", "without")
    )
    start = {
        f"trunk.{k.removeprefix('model.')}": v for k, v in load_file(model_dir / "model.safetensors").items()
    }
    start["head.weight"] = torch.zeros_like(ours["head.weight"])
    for name in ours:
        decayed = theirs[name] - RATE * DECAY * start[name]
        assert_close(
            ours[name], theirs[name] if ours[name].dim() == 1 else decayed, atol=1e-6, rtol=0, msg=name
        )


@pytest.mark.parametrize("lora", [{}, {"lora_r": 2}], ids=["weights", "adapter"])
def test_a_resumed_run_with_decay_equals_one_that_was_never_stopped(
    lora: dict[str, Any], model_dir: Path, tmp_path: Path
) -> None:
    model = {"model_name_or_path": str(model_dir), **lora}
    changes = {
        "model": model,
        "optim": {
            "weight_decay": 0.5,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_ratio": 0.25,
        },
        "discriminator": {"weight_decay": 0.5},
    }
    train(recipe(model_dir, tmp_path / "whole", **changes))
    run_until(3, recipe(model_dir, tmp_path / "cut", **changes))
    train(recipe(model_dir, tmp_path / "cut", resume="auto", **changes))
    assert_same_run(tmp_path / "cut", tmp_path / "whole", 4)


def test_states_are_saved_by_name(tmp_path: Path) -> None:
    """Each parameter gets its own moments back, although the groups have another order than the model."""
    model = make_model()
    optimizer = adamw(model, weight_decay=0.1, lr=RATE)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(number + 1))
    optimizer.step()
    save_optimizer(optimizer.state_dict(), tmp_path / "optimizer")
    saved = load_file(tmp_path / "optimizer.safetensors")
    for number, (name, parameter) in enumerate(model.named_parameters()):
        assert_close(saved[f"{name}.exp_avg"], torch.full_like(parameter, 0.1 * (number + 1)))
    other = adamw(model, weight_decay=0.1, lr=RATE)
    load_optimizer(other, tmp_path / "optimizer")
    for parameter in model.parameters():
        assert_close(other.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
        assert other.state[parameter]["step"] == 1


def test_states_of_other_parameters_and_of_earlier_versions_are_refused(
    model_dir: Path, tmp_path: Path
) -> None:
    values = recipe(model_dir, tmp_path / "run", method="sft", max_steps=2)
    train(values)
    path = checkpoint.checkpoint_path(tmp_path / "run", 2)
    optimizer = adamw(make_model(), weight_decay=0.0, lr=RATE)
    with pytest.raises(uniapl.UsageError, match=r"state of 'model\..*', which is not trained"):
        load_optimizer(optimizer, path / "policy_optimizer")
    file = path / "policy_optimizer.safetensors"
    old = {f"{number}.exp_avg": tensor for number, tensor in enumerate(load_file(file).values())}
    checkpoint.write_directory(
        tmp_path / "old" / "checkpoints" / "step-000002",
        lambda folder: copy_with(path, folder, file.name, old),
    )
    resumed = recipe(model_dir, tmp_path / "old", method="sft", max_steps=3, resume="auto")
    with pytest.raises(uniapl.UsageError, match=r"earlier version.*model\.model_name_or_path"):
        train(resumed)


def copy_with(source: Path, target: Path, name: str, tensors: dict[str, Tensor]) -> None:
    for file in source.iterdir():
        if file.name not in ("manifest.json", name):
            (target / file.name).write_bytes(file.read_bytes())
    save_file(tensors, target / name)


SCHEDULES: dict[str, dict[str, Any]] = {
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "polynomial": {"lr_end": 1e-6, "power": 2.0},
    "inverse_sqrt": {"timescale": 10},
    "warmup_stable_decay": {"num_decay_steps": 4, "min_lr_ratio": 0.2},
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [{"warmup_steps": 0}, {"warmup_steps": 3}, {"warmup_ratio": 0.21}])
def test_learning_rates_equal_those_of_a_stepped_scheduler(kind: str, warmup: dict[str, Any]) -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    steps = warmup.get("warmup_steps", 3)  # 0.21 x 10, rounded up
    scheduler: Any = get_scheduler(
        kind,
        optimizer,
        num_warmup_steps=steps,
        num_training_steps=10,
        scheduler_specific_kwargs=dict(SCHEDULES[kind]),
    )
    optim = OptimConfig.model_validate(
        {"learning_rate": RATE, "lr_scheduler_type": kind, "lr_scheduler_kwargs": SCHEDULES[kind], **warmup}
    )
    check_schedule(optim, 10)
    rate = learning_rates(optim, 10)
    for step in range(10):
        assert rate(step) == optimizer.param_groups[0]["lr"], step
        optimizer.step()
        scheduler.step()


def test_the_schedules_of_earlier_versions_keep_their_values() -> None:
    """Constant has a warm-up; linear and cosine end at 0 after the last step."""

    def rates(kind: str, **changes: Any) -> list[float]:
        values = {"learning_rate": 1.0, "lr_scheduler_type": kind, **changes}
        rate = learning_rates(OptimConfig.model_validate(values), 4)
        return [rate(step) for step in range(5)]

    assert rates("constant") == [1.0] * 5
    assert rates("constant", warmup_steps=2) == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert rates("linear") == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates("cosine") == pytest.approx([1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0.0])


def test_a_run_uses_its_schedule(model_dir: Path, tmp_path: Path) -> None:
    optim = {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine_with_min_lr",
        # As YAML reads 1e-4.
        "lr_scheduler_kwargs": {"min_lr": "1e-4"},
        "warmup_ratio": 0.5,
    }
    train(recipe(model_dir, tmp_path / "run", method="sft", optim=optim))
    rates = [record["learning_rate"] for record in lines(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 5.5e-4])


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "optim.lr_scheduler_kwargs {} for 'cosine_with_min_lr'",
        ),
        ({"lr_scheduler_kwargs": {"min_lr": 1e-5}}, "for 'constant': it takes no arguments"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
            "unexpected keyword argument 'min_lr'",
        ),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, "for 'polynomial'"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "high"}},
            "{'power': 'high'} for 'polynomial'",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1.0}},
            "the learning rate of step 1 is -0.24925",
        ),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "optim.lr_scheduler_type"),
        ({"warmup_steps": 2, "warmup_ratio": 0.1}, "set the same warm-up"),
    ],
)
def test_wrong_schedules_are_refused_before_training(
    optim: dict[str, Any], message: str, model_dir: Path, tmp_path: Path
) -> None:
    values = recipe(model_dir, tmp_path / "run", method="sft")
    values["optim"] = {"learning_rate": 1e-3, **optim}
    with pytest.raises(uniapl.UsageError) as error:
        train(values)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_schedule_on_the_command_line() -> None:
    flags = [
        "--optim.lr-scheduler-type",
        "cosine_with_min_lr",
        "--optim.lr-scheduler-kwargs",
        "min_lr_rate",
        "0.1",
    ]
    config = resolve({}, flags).config
    assert config.optim.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
