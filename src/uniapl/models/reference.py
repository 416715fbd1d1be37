"""A policy of an earlier step: what training changes is kept as it was, everything else is shared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from uniapl.config import ModelConfig
from uniapl.models.loading import load_model
from uniapl.models.lora import is_adapter, read_adapter
from uniapl.models.policy import Policy


class Reference(nn.Module):
    """The policy's own computation with other weights: of a policy that is an adapter, another adapter's."""

    def __init__(self, policy: Policy, weights: Mapping[str, Tensor]) -> None:
        """Weights by the names of the policy's parameters: all of those that are trained."""
        super().__init__()
        # In a list: what the policy holds is not the reference's.
        self._policy = [policy]
        self.weights = dict(weights)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the policy said when these were its weights."""
        return functional_call(self._policy[0], self.weights, args, kwargs)

    def follow(self) -> None:
        """From now on it is the policy as it is now."""
        self._set(trained_weights(self._policy[0]))

    def save(self, path: Path) -> None:
        """Its weights as safetensors."""
        save_file({name: tensor.contiguous() for name, tensor in self.weights.items()}, path)

    def load(self, path: Path) -> None:
        """The inverse of :meth:`save`."""
        self._set(load_file(path))

    @torch.no_grad()
    def _set(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by their names."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def reference_at_start(policy: Policy, config: ModelConfig, start: Path | None) -> Reference:
    """The policy as it was when its stage began, whatever it has learnt since.

    Args:
        start: Directory with the weights that the stage started from; None for the run's own start.
    """
    if config.lora_r is None:
        weights = trained_weights(load_model(config, start))
    else:
        name = start or config.model_name_or_path
        if name is not None and is_adapter(name):
            weights = read_adapter(policy.model, name)
        else:
            # An adapter of zeros changes nothing.
            weights = {name: torch.zeros_like(t) for name, t in trained_weights(policy.model).items()}
    device = policy.model.device
    return Reference(policy, {f"model.{name}": tensor.to(device) for name, tensor in weights.items()})
