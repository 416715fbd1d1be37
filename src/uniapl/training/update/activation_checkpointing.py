"""Gradient checkpointing: the backward pass recomputes activations instead of keeping them."""

import contextlib
import functools
from collections.abc import Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from uniapl.errors import UsageError


@contextlib.contextmanager
def activation_checkpointing(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Within this context the model's layers keep only their inputs for the backward pass.

    transformers' own gradient checkpointing needs training mode, which would enable dropout.
    """
    layers = checkpointed_layers(model) if enabled else []
    for layer in layers:
        # Layers draw no random numbers in eval mode, so the generator's state need not be kept.
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def checkpointed_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can recompute their activations.

    Raises:
        UsageError: The model has none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(
            f"optim.gradient_checkpointing: {type(model).__name__} does not support it in transformers; "
            "remove the key"
        )
    return layers
