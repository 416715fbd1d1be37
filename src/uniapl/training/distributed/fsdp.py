"""FSDP2: weights, gradients and optimizers shared out to the processes; whole weights where they are read.

A sharded module has a twin, the module that it was made from. The shards learn. The twin samples, scores and
is saved: it holds the whole weights while it does so, and nothing in between. All but an update works as it
does without shards, and no process waits for another in the middle of it.
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

CONFIGURATION = "recipes/accelerate/fsdp2.yaml"


def check_launch() -> None:
    """Refuse what a launcher asks for and this version cannot do.

    Raises:
        UsageError: It names the setting and the remedy.
    """
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise UsageError(
            "launched with DeepSpeed: use torchrun (DDP), or FSDP2, which shards as ZeRO-3 does: "
            f"accelerate launch --config_file {CONFIGURATION}"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # One process has nobody to share with.
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    if not _asked("ACCELERATE_USE_FSDP"):
        return
    # With it transformers would load weights in the first process alone.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UsageError(f"launched with FSDP1: set fsdp_version to 2, as in {CONFIGURATION}")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UsageError("launched with fsdp_offload_params: set it to false; shards stay on their device")
    if plugin.activation_checkpointing:
        raise UsageError(
            "launched with fsdp_activation_checkpointing: set it to false, and optim.gradient_checkpointing "
            "to true in the recipe"
        )


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def shards_weights() -> bool:
    """Whether this run was launched to share its weights out; :func:`check_launch` has let it."""
    # Not the accelerator's distributed_type: on CPUs it does not say so.
    return _asked("ACCELERATE_USE_FSDP")


def check_sharding(config: Config) -> None:
    """What a stage cannot do with shards.

    Raises:
        UsageError: It names the key.
    """
    discriminator = config.objective.lambda_adv > 0 and config.discriminator.lora_r is not None
    for key, given in (
        ("model.lora_r", config.model.lora_r is not None),
        ("discriminator.lora_r", discriminator),
    ):
        if given:
            raise UsageError(
                f"{key} does not work with FSDP2: an adapter's gradients and optimizer are small; use "
                "torchrun (DDP), or leave it out"
            )


def distribute(
    accelerator: Accelerator, module: nn.Module, make_optimizer: Callable[[list[nn.Parameter]], Optimizer]
) -> tuple[nn.Module, Optimizer]:
    """What learns, and its optimizer: the module itself, wrapped for DDP, or its sharded twin."""
    if not shards_weights():
        return accelerator.prepare(module, make_optimizer(_trained(module)))
    shards = shard(accelerator, copy.deepcopy(module))
    return shards, make_optimizer(_trained(shards))


def shard(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Share a module's weights out: layer by layer, and the rest at its root.

    By torch itself: accelerate's own way shards on GPUs alone, and in bf16 where autocast wants fp32 weights.
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
    """Whether its weights are shared out."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@contextlib.contextmanager
def gathered(module: nn.Module, shards: nn.Module) -> Iterator[None]:
    """The module with the whole weights of its sharded twin; all processes enter and leave together.

    Args:
        shards: Where it is no sharded twin, nothing happens.
    """
    gather(module, shards)
    try:
        yield
    finally:
        release(module, shards)


def gather(module: nn.Module, shards: nn.Module) -> None:
    """Fill a module from its sharded twin."""
    if is_sharded(shards):
        for parameter, shard in zip(module.parameters(), shards.parameters(), strict=True):
            parameter.data = full(shard)


def release(module: nn.Module, shards: nn.Module) -> None:
    """Free a module's weights, where a sharded twin has them."""
    if is_sharded(shards):
        for parameter in module.parameters():
            parameter.data = parameter.data.new_empty(0)


@torch.no_grad()
def scatter(module: nn.Module, shards: nn.Module) -> None:
    """Give a module's weights to its sharded twin."""
    if is_sharded(shards):
        for parameter, shard in zip(module.parameters(), shards.parameters(), strict=True):
            shard.copy_(like(parameter, shard))


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be shared out; all processes ask for it together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor shared out as `pattern` is, if it is; every process has all of it."""
    if not isinstance(pattern, DTensor):
        return tensor
    tensor = tensor.detach().to(pattern.device)
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def optimizer_state(optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """An optimizer's state with whole tensors; all processes ask for it together.

    Args:
        keep: This process wants it; the others only give their part.
    """
    state = optimizer.state_dict()
    # Tensor by tensor, so that no device ever holds all. In new dictionaries: those are the optimizer's own.
    state["state"] = {
        index: {name: _kept(value, keep) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return state


def _kept(value: Any, keep: bool) -> Any:
    if not isinstance(value, DTensor):
        return value
    everything = full(value)
    return everything.cpu() if keep else None


def num_empty_micro_batches(accelerator: Accelerator, count: int) -> int:
    """How many backward passes without a loss this process adds to its `count` of an update.

    DDP exchanges gradients in the last one. Shards are exchanged in every one: all processes need as many.
    """
    if accelerator.num_processes == 1:
        return 0
    return max(1, *gather_object([count])) - count if shards_weights() else 1


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
