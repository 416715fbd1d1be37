"""Model sections of a recipe, the models they name, and the logits of a model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from uniapl.config import ModelConfig
from uniapl.models.loading import ModelSource, load_model, load_policy

IDS = torch.arange(2, 22).reshape(2, 10)


def settings(model_dir: Path, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"model_name_or_path": str(model_dir), "lora_r": 4, **changes})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def complete_model(config: ModelConfig) -> PreTrainedModel:
    """The model that a recipe names, with its adapter merged."""
    return load_model(ModelSource.resolve(config))


def policy_model(config: ModelConfig, weights: Path | None = None, *, seed: int = 0) -> PreTrainedModel:
    """The model that a recipe trains, with the weights saved in a directory."""
    return load_policy(ModelSource.resolve(config).with_weights(weights), config, seed=seed)
