"""The reference policy: earlier values of the trained parameters in the policy's own modules."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from uniapl.models.loading import ModelSource, load_model
from uniapl.models.lora import read_adapter
from uniapl.models.policy import Policy


class Reference(nn.Module):
    """The policy's forward with other values of its trained parameters; frozen parameters are shared."""

    def __init__(self, policy: Policy, weights: Mapping[str, Tensor]) -> None:
        """`weights` holds a tensor for each trained parameter of the policy, by name."""
        super().__init__()
        # In a list, so that the policy is not registered as a submodule.
        self._policy = [policy]
        self.weights = dict(weights)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`Policy.forward`, without gradient."""
        return functional_call(self._policy[0], self.weights, args, kwargs)

    def copy_policy(self) -> None:
        """Copy the current weights of the policy."""
        self._set(trained_weights(self._policy[0]))

    def save(self, path: Path) -> None:
        """Write the weights as safetensors."""
        save_file({name: tensor.contiguous() for name, tensor in self.weights.items()}, path)

    def load(self, path: Path) -> None:
        """Read the weights that :meth:`save` wrote."""
        self._set(load_file(path))

    @torch.no_grad()
    def _set(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by name, detached."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def reference_at_start(policy: Policy, source: ModelSource) -> Reference:
    """The reference with the weights in `source`, from which the policy's stage started."""
    if getattr(policy.model, "peft_config", None) is None:
        weights = trained_weights(load_model(source))
    elif source.adapter is not None:
        weights = read_adapter(policy.model, source.adapter)
    else:
        # A new adapter does not change the base model, and neither does one of zeros.
        weights = {name: torch.zeros_like(t) for name, t in trained_weights(policy.model).items()}
    device = policy.model.device
    return Reference(policy, {f"model.{name}": tensor.to(device) for name, tensor in weights.items()})
