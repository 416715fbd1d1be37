"""AdamW as in transformers' Trainer: the parameters that decay, and the learning rate of each step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from uniapl.config import OptimConfig
from uniapl.errors import UsageError

NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
"""Names of parameters without weight decay: those of transformers' `Trainer.get_decay_parameter_names`."""
CHECKED_STEPS = 1000
"""Steps at which a schedule is evaluated before training."""


def adamw(module: nn.Module, *, weight_decay: float, **settings: Any) -> AdamW:
    """AdamW on a module's trainable parameters; norms and biases have no weight decay.

    The groups hold the parameters' names, under which checkpoints save their state.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    decaying = set(get_parameter_names(module, [nn.LayerNorm], NO_DECAY))
    groups = [
        {
            "params": [(name, p) for name, p in trained.items() if (name in decaying) == decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    return AdamW([group for group in groups if group["params"]], fused=True, **settings)


def learning_rates(optim: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the step, from 0, by transformers' `get_scheduler`.

    "constant" has a warm-up, unlike in transformers, where only "constant_with_warmup" has one.

    Args:
        total_steps: Length of the complete schedule.

    Raises:
        UsageError: The schedule does not take `lr_scheduler_kwargs`, or needs others.
    """
    kind, kwargs = optim.lr_scheduler_type, optim.lr_scheduler_kwargs
    constant = kind.startswith("constant")
    warmup_steps = optim.warmup_steps or math.ceil(total_steps * optim.warmup_ratio)
    try:
        if constant and kwargs:
            raise TypeError("it takes no arguments")
        scheduler: Any = get_scheduler(
            "constant_with_warmup" if constant else kind,
            SGD([torch.zeros(1, requires_grad=True)], lr=optim.learning_rate),
            num_warmup_steps=warmup_steps,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=dict(kwargs),
        )
        (factor,) = scheduler.lr_lambdas
    except Exception as error:  # the schedules raise many types for wrong arguments
        raise UsageError(f"optim.lr_scheduler_kwargs {kwargs} for '{kind}': {error}") from error
    return lambda step: optim.learning_rate * factor(step)


def check_schedule(optim: OptimConfig, total_steps: int) -> None:
    """Evaluate a stage's learning rate.

    Raises:
        UsageError: The arguments do not fit the schedule, or a learning rate is negative or not finite.
    """
    rate = learning_rates(optim, total_steps)
    for step in (*range(0, total_steps, max(1, total_steps // CHECKED_STEPS)), total_steps - 1):
        try:
            problem = "" if 0 <= (value := rate(step)) < math.inf else f"is {value}"
        except Exception as error:  # the schedules raise many types for wrong arguments
            problem = f"cannot be computed: {error}"
        if problem:
            raise UsageError(
                f"optim.lr_scheduler_kwargs {optim.lr_scheduler_kwargs} for '{optim.lr_scheduler_type}': the "
                f"learning rate of step {step} {problem}"
            )
