"""The discriminator as adapters on the policy's weights: its scores, and an unchanged policy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedModel

import uniapl
from support.comparisons import COMPARISONS, sequences
from support.lora_trunk import on
from support.runs import lines, recipe, run_until, timeless, train
from support.tiny import make_model
from uniapl.discriminator.bradley_terry import BradleyTerryDiscriminator, ScoreModel
from uniapl.discriminator.lora import SCALE, LoraTrunk
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.update.discriminator_step import discriminator_step


def merged(model: PreTrainedModel, trunk: LoraTrunk) -> PreTrainedModel:
    """A copy of the policy with the adapters merged."""
    copy = make_model()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, layer in copy.base_model.named_modules():
            if isinstance(layer, nn.Linear):
                key = name.replace(".", "/")
                layer.weight += SCALE * trunk.up[key] @ trunk.down[key]
    return copy


@pytest.mark.parametrize("trained", [False, True])
def test_it_scores_as_the_policy_with_merged_adapters_would(trained: bool) -> None:
    model = make_model()
    subject = on(model, trained=trained)
    plain = ScoreModel.copy_of(merged(model, subject.module.trunk))
    plain.head.load_state_dict(subject.module.head.state_dict())
    expected = BradleyTerryDiscriminator(module=plain, pad_id=0, max_tokens=10_000).logits(sequences())
    assert subject.logits(sequences()) == pytest.approx(expected, abs=2e-4)
    unadapted = ScoreModel.copy_of(model)
    unadapted.head.load_state_dict(subject.module.head.state_dict())
    plainly = BradleyTerryDiscriminator(module=unadapted, pad_id=0, max_tokens=10_000).logits(sequences())
    assert (subject.logits(sequences()) == pytest.approx(plainly, abs=1e-2)) == (not trained)


def test_it_learns_and_the_policy_does_not_notice() -> None:
    model = make_model(scale=1.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(2, 12).unsqueeze(0)
    with torch.no_grad():
        spoken = model(ids).logits
    subject = on(model, trained=False)
    nn.init.zeros_(subject.module.head.weight)
    names = {name for name, _ in subject.module.named_parameters()}
    assert all(name.startswith(("trunk.down", "trunk.up", "head")) for name in names)
    optimizer = torch.optim.AdamW(subject.module.parameters(), lr=1e-2)
    accelerator = Accelerator(cpu=True)
    losses = [
        discriminator_step(accelerator, subject, subject.module, optimizer, COMPARISONS, max_grad_norm=1.0)[0]
        for _ in range(30)
    ]
    assert losses[-1] < 0.1 < 0.5 < losses[0]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert_close(model(ids).logits, spoken, atol=0.0, rtol=0.0)


def test_every_adapter_learns() -> None:
    subject = on(make_model(), trained=True)
    for losses in subject.losses(COMPARISONS):
        losses()["pairs"].backward()
    assert all(
        parameter.grad is not None and bool(parameter.grad.any()) for parameter in subject.module.parameters()
    )


def test_a_run_with_adapters_resumes_exactly(model_dir: Path, tmp_path: Path) -> None:
    adversary = {"lora_r": 2, "learning_rate": 1e-2, "in_context_demonstration": True}
    values: dict[str, Any] = {"max_steps": 6, "save_steps": 3, "discriminator": adversary}
    train(recipe(model_dir, tmp_path / "whole", **values))
    run_until(4, recipe(model_dir, tmp_path / "broken", **values))
    train(recipe(model_dir, tmp_path / "broken", resume="auto", **values))
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    assert timeless(lines(whole / "metrics.jsonl")) == timeless(lines(broken / "metrics.jsonl"))
    weights = [
        load_file(checkpoint.checkpoint_path(path, 6) / "discriminator.safetensors")
        for path in (whole, broken)
    ]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    assert not any("embed" in name or "norm" in name for name in weights[0])
    assert any(tensor.any() for name, tensor in weights[0].items() if name.startswith("trunk.up"))
    with pytest.raises(uniapl.UsageError, match="the recipe has 'bradley-terry'"):
        train(recipe(model_dir, broken, resume="auto", max_steps=7))


def test_adapters_need_the_policy_s_own_weights(model_dir: Path, tmp_path: Path) -> None:
    adversary = {"lora_r": 2, "model_name_or_path": str(model_dir)}
    with pytest.raises(uniapl.UsageError, match="trains adapters on the policy"):
        train(recipe(model_dir, tmp_path / "run", discriminator=adversary))
