"""The discriminator on the policy's own weights: adapters of low rank and a head, one backbone in memory."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
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
    """A trunk that reads with the policy's weights as they are now, each linear layer changed by its adapter.

    y + SCALE B A x, with B starting at zero (LoRA, arXiv 2106.09685). The adapters are there while it reads
    and at no other time: the policy samples, learns and is saved as if they did not exist. Of a policy that
    is an adapter itself it reads with the base alone.
    """

    def __init__(self, model: PreTrainedModel, rank: int, *, seed: int) -> None:
        """Adapters of `rank` for every linear layer of the policy's trunk, drawn from the seed."""
        super().__init__()
        trunk: Any = model.base_model
        if trunk is model:
            raise UsageError(
                f"{type(model).__name__} has no trunk apart from its head: leave out discriminator.lora_r"
            )
        # In a list: the policy's weights are no parameters of the discriminator.
        self._trunk = [trunk]
        self.takes_positions = "position_ids" in inspect.signature(trunk.forward).parameters
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in linear_layers(trunk).items():
            key = name.replace(".", "/")
            generator = torch.Generator().manual_seed(derive_seed(seed, "adapter", name))
            down = torch.empty(rank, layer.in_features)
            nn.init.kaiming_uniform_(down, a=5**0.5, generator=generator)
            self.down[key] = nn.Parameter(down.to(layer.weight.device))
            self.up[key] = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))
        if not self.down:
            raise UsageError(
                f"{type(model).__name__} has no linear layer to adapt: leave out discriminator.lora_r"
            )

    @property
    def config(self) -> Any:
        """The policy's."""
        return self._trunk[0].config

    def get_input_embeddings(self) -> nn.Module:
        """The policy's."""
        return self._trunk[0].get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        use_cache: bool = False,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """What the trunk returns, read through the adapters; no gradient reaches the policy."""
        if self.takes_positions:
            options["position_ids"] = position_ids
        with self._adapted():
            return self._trunk[0](
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=use_cache,
                **options,
            )

    @contextlib.contextmanager
    def _adapted(self) -> Iterator[None]:
        """The trunk with its adapters, its own weights frozen."""
        trunk = self._trunk[0]
        layers = dict(trunk.named_modules())
        trained = [parameter for parameter in trunk.parameters() if parameter.requires_grad]
        handles = [
            layers[key.replace("/", ".")].register_forward_hook(_adapter(down, self.up[key]))
            for key, down in self.down.items()
        ]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            with without_adapter(trunk):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in trained:
                parameter.requires_grad_(True)


def _adapter(down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change = nn.functional.linear(SCALE * nn.functional.linear(inputs[0], down), up)
        # In place: nothing that a linear layer needs for its gradient is in its output.
        return output.add_(change.to(output.dtype))

    return add
