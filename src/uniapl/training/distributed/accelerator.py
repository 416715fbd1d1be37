"""The accelerator of a run."""

from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    set_seed,
)

from uniapl.config import Config
from uniapl.errors import UsageError
from uniapl.training.distributed import fsdp

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


def uses_bf16(config: Config) -> bool:
    """Whether models run under bf16 autocast: `optim.bf16`, or whether the GPU can if that is null."""
    if config.optim.bf16 is not None:
        return config.optim.bf16
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def make_accelerator(config: Config) -> Accelerator:
    """Return the run's accelerator, with its device, precision and ranks, and seed the global generators.

    Raises:
        UsageError: The launcher requests a kind of training that is not supported.
    """
    device = torch.accelerator.current_accelerator()
    # accelerate would keep the precision of an earlier run in this process.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    fsdp.check_launch()
    accelerator = Accelerator(
        # The sampler needs fp64, which Apple's GPUs do not support.
        cpu=device is None or device.type == "mps",
        mixed_precision="bf16" if uses_bf16(config) else "no",
        log_with=list(config.report_to) or None,
        # Absolute, because a reward function may change the working directory.
        project_dir=str(Path(config.output_dir).absolute()),
        kwargs_handlers=[
            # Ranks wait while rank 0 tests verifiers or saves; NCCL's default is ten minutes.
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),
            # Buffers do not change, and a broadcast would hang if the forward pass of one rank fails.
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    # accelerate must not divide the loss, also if an environment variable requests it.
    accelerator.gradient_accumulation_steps = 1
    if accelerator.distributed_type not in SUPPORTED:
        raise UsageError(
            f"launched with {accelerator.distributed_type.value}: UniAPL trains in one process, with DDP or "
            "with FSDP2; use torchrun, or accelerate launch --use_fsdp --fsdp_version 2"
        )
    set_seed(config.seed)
    return accelerator
