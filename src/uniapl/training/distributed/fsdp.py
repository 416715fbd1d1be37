"""FSDP2: parameters, gradients and optimizer state are sharded; full parameters are gathered when needed.

Each sharded module is a copy of an unsharded module. Only the sharded module is trained. The unsharded module
is used for sampling, scoring and saving; it has its parameters only while it is used. These operations
therefore work as they do without FSDP, and ranks do not wait for each other within them.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from uniapl.config import Config
from uniapl.errors import UsageError


def check_launch() -> None:
    """Raise a UsageError for launchers other than DDP and FSDP2; set the environment variables of FSDP2."""
    if _is_true("ACCELERATE_USE_DEEPSPEED"):
        raise UsageError(
            "launched with DeepSpeed: use torchrun (DDP), or FSDP2, which shards like ZeRO-3: "
            "accelerate launch --use_fsdp --fsdp_version 2"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    if not shards_weights():
        return
    # transformers would otherwise load the weights only on rank 0.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UsageError("launched with FSDP1: set fsdp_version to 2 in accelerate's configuration")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UsageError("launched with fsdp_offload_params: set it to false; shards stay on their device")
    if plugin.activation_checkpointing:
        raise UsageError(
            "launched with fsdp_activation_checkpointing: set it to false, and optim.gradient_checkpointing "
            "to true in the recipe"
        )


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def shards_weights() -> bool:
    """Whether this run was launched with FSDP2."""
    # The accelerator's distributed_type does not show FSDP on CPUs.
    return _is_true("ACCELERATE_USE_FSDP")


def check_sharding(config: Config) -> None:
    """Raise a UsageError if a stage would train adapters with FSDP2."""
    discriminator = config.objective.lambda_adv > 0 and config.discriminator.lora_r is not None
    keys = {"model.lora_r": config.model.lora_r is not None, "discriminator.lora_r": discriminator}
    for key, is_set in keys.items():
        if is_set:
            raise UsageError(
                f"{key} does not work with FSDP2, which saves little memory for adapters: use torchrun (DDP) "
                "or leave it out"
            )


def distribute(
    accelerator: Accelerator, module: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]
) -> tuple[nn.Module, Optimizer]:
    """Return the module to train and its optimizer: the module wrapped for DDP, or a sharded copy."""
    if not shards_weights():
        return accelerator.prepare(module, make_optimizer(module))
    sharded = shard(accelerator, copy.deepcopy(module))
    return sharded, make_optimizer(sharded)


def shard(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Shard a module in place, layer by layer, and the remaining parameters at its root.

    This uses torch directly, because accelerate shards only on GPUs and converts the weights to bf16, while
    autocast needs fp32 weights.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    reshard = bool(FullyShardedDataParallelPlugin().reshard_after_forward)
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    names = {name for model in models for name in model._no_split_modules or ()}
    for layer in [part for part in module.modules() if type(part).__name__ in names]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(module, mesh=mesh)
    return module


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's parameters are sharded."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@contextlib.contextmanager
def gathered(module: nn.Module, sharded: nn.Module) -> Iterator[None]:
    """Give a module the full parameters of its sharded copy; all ranks enter and leave together.

    Args:
        sharded: Nothing happens if its parameters are not sharded.
    """
    gather(module, sharded)
    try:
        yield
    finally:
        release(module, sharded)


def gather(module: nn.Module, sharded: nn.Module) -> None:
    """Fill a module's parameters from its sharded copy."""
    if is_sharded(sharded):
        for parameter, shard in zip(module.parameters(), sharded.parameters(), strict=True):
            parameter.data = full(shard)


def release(module: nn.Module, sharded: nn.Module) -> None:
    """Free a module's parameters if it has a sharded copy."""
    if is_sharded(sharded):
        for parameter in module.parameters():
            parameter.data = parameter.data.new_empty(0)


@torch.no_grad()
def scatter(module: nn.Module, sharded: nn.Module) -> None:
    """Copy a module's parameters to its sharded copy."""
    if is_sharded(sharded):
        for parameter, shard in zip(module.parameters(), sharded.parameters(), strict=True):
            shard.copy_(like(parameter, shard))


def full(tensor: Tensor) -> Tensor:
    """Return the full tensor of a shard; all ranks call it together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """Shard a full tensor, which every rank has, in the same way as `pattern`."""
    if not isinstance(pattern, DTensor):
        return tensor
    tensor = tensor.detach().to(pattern.device)
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def optimizer_state(optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """Return an optimizer's state with full tensors; all ranks call it together.

    Args:
        keep: Whether this rank needs the state; the others get None for sharded tensors.
    """

    def gathered_value(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        # Copied to the CPU one by one, so that no device holds all of them.
        tensor = full(value)
        return tensor.cpu() if keep else None

    state = optimizer.state_dict()
    # New dictionaries, because state_dict returns the optimizer's own.
    state["state"] = {
        index: {name: gathered_value(value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return state


def num_empty_micro_batches(accelerator: Accelerator, count: int) -> int:
    """Return how many backward passes without a loss this rank adds to the `count` of its update.

    DDP synchronises gradients only in the last pass. FSDP2 communicates in every pass, so that all ranks need
    the same number.
    """
    if accelerator.num_processes == 1:
        return 0
    return max(1, *gather_object([count])) - count if shards_weights() else 1
