"""A discriminator with a LoRA trunk, for tests."""

import torch
from transformers import PreTrainedModel

from uniapl.discriminator.bradley_terry import BradleyTerryDiscriminator, ScoreModel
from uniapl.discriminator.lora import LoraTrunk


def on(model: PreTrainedModel, *, trained: bool) -> BradleyTerryDiscriminator:
    """A discriminator with a random head and random (trained) or initial adapters."""
    torch.manual_seed(3)
    module = ScoreModel(LoraTrunk(model, rank=2, seed=0))
    with torch.no_grad():
        module.head.weight.normal_()
        for up in module.trunk.up.values() if trained else ():
            up.normal_(std=0.3)
    return BradleyTerryDiscriminator(module=module, pad_id=0, max_tokens=10_000)
