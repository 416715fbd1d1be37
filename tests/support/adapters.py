"""A recipe with an adapter, and the logits of a model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniapl.config import ModelConfig

IDS = torch.arange(2, 22).reshape(2, 10)


def settings(model_dir: Path, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"model_name_or_path": str(model_dir), "lora_r": 4, **changes})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits
