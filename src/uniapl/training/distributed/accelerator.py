"""The accelerator of a run."""

from datetime import timedelta

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
from uniapl.training.distributed import fsdp as sharding


def make_accelerator(config: Config) -> Accelerator:
    """The accelerator of a run: this process's device, precision, and its place among the processes.

    Raises:
        UsageError: It was launched in a way that this version cannot train in.
    """
    bf16 = config.optim.bf16
    if bf16 is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    # The sampler sums probabilities in fp64, which Apple's GPUs do not have.
    device = torch.accelerator.current_accelerator()
    # accelerate keeps the first run's precision for the whole process; the next run may want another.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    sharding.check_launch()
    accelerator = Accelerator(
        cpu=device is None or device.type == "mps",
        mixed_precision="bf16" if bf16 else "no",
        log_with=list(config.report_to) or None,
        project_dir=config.output_dir,
        kwargs_handlers=[
            # The first process evaluates and saves while the others wait, for longer than NCCL's ten minutes.
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),
            # No buffer changes in training; exchanging them would leave behind a process whose forward fails.
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    # Every update is one optimizer step: accelerate must not divide, whatever its environment variables say.
    accelerator.gradient_accumulation_steps = 1
    supported = (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
        DistributedType.FSDP,
    )
    if accelerator.distributed_type not in supported:
        raise UsageError(
            f"launched with {accelerator.distributed_type.value}: this version trains on one process, with "
            "DDP or with FSDP2; use torchrun, or a configuration of recipes/accelerate"
        )
    set_seed(config.seed)
    return accelerator
