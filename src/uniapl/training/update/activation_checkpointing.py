"""Gradient checkpointing: activations are computed again when they are needed, instead of kept."""

import contextlib
import functools
from collections.abc import Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from uniapl.errors import UsageError


@contextlib.contextmanager
def recomputed(model: nn.Module, enabled: bool) -> Iterator[None]:
    """A model whose layers keep nothing but their inputs for the backward pass.

    Not as transformers does it, which asks for training mode: with it would come dropout.
    """
    layers = checkpointed_layers(model) if enabled else []
    for layer in layers:
        # Nothing is drawn at random in a layer: no generator's state need be kept.
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def checkpointed_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers whose activations can be computed again.

    Raises:
        UsageError: The model has none that transformers knows of.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(
            f"optim.gradient_checkpointing: {type(model).__name__} has no layers that transformers can "
            "compute again; leave it out"
        )
    return layers
