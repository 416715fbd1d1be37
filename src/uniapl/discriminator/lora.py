"""The trunk of a discriminator that shares the policy's weights: low-rank adapters on one backbone."""

import contextlib
import inspect
from collections.abc import Generator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from uniapl.errors import UsageError
from uniapl.models.lora import linear_layers, without_adapter
from uniapl.types import derive_seed

SCALE = 2.0
"""alpha / rank of LoRA (arXiv 2106.09685), the usual choice."""


class LoraTrunk(nn.Module):
    """The policy's current trunk with an adapter on each linear layer: y + SCALE B A x, where B starts at 0.

    The adapters exist only during a forward pass of the discriminator: they do not affect sampling, training
    and saving of the policy. If the policy has an adapter itself, only its base model is used.
    """

    def __init__(self, model: PreTrainedModel, rank: int, *, seed: int) -> None:
        """Draw adapters of this rank for every linear layer of the policy's trunk."""
        super().__init__()
        trunk: Any = model.base_model
        name = type(model).__name__
        if trunk is model:
            raise UsageError(f"{name} has no trunk without its head: leave out discriminator.lora_r")
        # In a list, so that the policy's weights are not registered as the discriminator's parameters.
        self._trunk = [trunk]
        self.takes_positions = "position_ids" in inspect.signature(trunk.forward).parameters
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for layer_name, layer in linear_layers(trunk).items():
            key, device = layer_name.replace(".", "/"), layer.weight.device
            generator = torch.Generator().manual_seed(derive_seed(seed, "adapter", layer_name))
            down = torch.empty(rank, layer.in_features)
            nn.init.kaiming_uniform_(down, a=5**0.5, generator=generator)
            self.down[key] = nn.Parameter(down.to(device))
            self.up[key] = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        if not self.down:
            raise UsageError(f"{name} has no linear layer to adapt: leave out discriminator.lora_r")

    @property
    def config(self) -> Any:
        """The policy's configuration."""
        return self._trunk[0].config

    def get_input_embeddings(self) -> nn.Module:
        """Return the policy's input embeddings."""
        return self._trunk[0].get_input_embeddings()

    def forward(self, *, position_ids: Tensor | None = None, **inputs: Any) -> Any:
        """Return the output of the adapted trunk; no gradient reaches the policy."""
        if self.takes_positions:
            inputs["position_ids"] = position_ids
        with self._adapted():
            return self._trunk[0](**inputs)

    @contextlib.contextmanager
    def _adapted(self) -> Generator[None]:
        """Attach the adapters and freeze the trunk's own weights."""
        trunk = self._trunk[0]
        trainable = [parameter for parameter in trunk.parameters() if parameter.requires_grad]
        with contextlib.ExitStack() as stack:
            for key, down in self.down.items():
                layer = trunk.get_submodule(key.replace("/", "."))
                handle = layer.register_forward_hook(partial(_add_adapter, down, self.up[key]))
                stack.callback(handle.remove)
            for parameter in trainable:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
            stack.enter_context(without_adapter(trunk))
            yield


def _add_adapter(
    down: Tensor, up: Tensor, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    change = nn.functional.linear(SCALE * nn.functional.linear(inputs[0], down), up)
    # In place: the gradient of a linear layer does not need its output.
    return output.add_(change.to(output.dtype))
