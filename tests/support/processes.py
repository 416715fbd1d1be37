"""Processes that communicate by gloo, forked from a server that has imported the heavy libraries once."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PRELOADED = ["torch", "transformers", "accelerate", "peft", "datasets", "support.runs"]


def run_processes(world: int, work: Callable[..., None], folder: Path, *arguments: Any) -> list[int | None]:
    """Call `work(folder, *arguments)` in `world` processes of one process group; return their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started = [
        context.Process(target=_one, args=(rank, world, work, folder, *arguments)) for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=240)
    ended = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return ended


def _one(rank: int, world: int, work: Callable[..., None], folder: Path, *arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    work(folder, *arguments)
    torch.distributed.destroy_process_group()
