"""TRL's side of the benchmarks: GRPOTrainer with given prompts, completions, rewards and lengths."""

import os

# Disables TRL's telemetry.
os.environ.setdefault("CI", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import contextlib
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from planned import Plan, PlannedEnd, continuous_batching_planned
from transformers import LogitsProcessorList
from trl import GRPOConfig, GRPOTrainer
from work import Shape, Work, load, random_reward

warnings.filterwarnings("ignore", category=FutureWarning)

BEST = {"gradient_checkpointing": False}
"""The TRL settings that make it faster at every size; benchmarks choose the micro-batch size separately."""


class Trainer(GRPOTrainer):
    """GRPOTrainer with planned completion lengths, and with one fixed batch if only the update is timed."""

    plan: Plan | None = None
    """Planned lengths of the completions that it samples."""
    one_batch = False
    """Whether every update uses the first batch."""

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self.one_batch and self._buffered_inputs is not None:
            return self._buffered_inputs[self._step % self.args.steps_per_generation]
        return super()._prepare_inputs(generation_batch)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.plan is None:
            return super()._generate_single_turn(*args, **kwargs)
        if self.use_transformers_continuous_batching:
            with continuous_batching_planned(self.plan):
                return super()._generate_single_turn(*args, **kwargs)
        generate = self.model.generate

        def planned(input_ids: torch.Tensor, **settings: Any) -> Any:
            rows, width = input_ids.shape
            end = PlannedEnd(self.plan.take(rows), width, input_ids.device)
            return generate(input_ids=input_ids, logits_processor=LogitsProcessorList([end]), **settings)

        # The instance attribute hides the class's method until it is deleted.
        self.model.generate = planned
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            del self.model.generate


def make_trainer(
    shape: Shape,
    folder: Path,
    options: Namespace,
    rows: list[dict[str, Any]],
    *,
    reward: Callable[..., Any] = random_reward,
    rollout_func: Callable[..., Any] | None = None,
    micro_batch: int = 8,
    steps: int = 1000,
    **settings: Any,
) -> Trainer:
    """Build a trainer for the shape, with TRL's defaults except for the precision and the given settings."""
    model, tokenizer = load(folder, options.device)
    micro_batch = min(micro_batch, shape.rows)
    with contextlib.redirect_stdout(None):
        trainer = Trainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=str(folder.parent / "trl"),
                report_to="none",
                use_cpu=options.device == "cpu",
                bf16=options.bf16,
                num_generations=shape.generations,
                max_completion_length=shape.completion_length,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=shape.rows // micro_batch,
                max_steps=steps,
                lr_scheduler_type="constant",
                shuffle_dataset=False,
                logging_steps=steps,
                save_strategy="no",
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            rollout_func=rollout_func,
        )
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


def their_update(
    work: Work, folder: Path, options: Namespace, *, micro_batch: int = 8, **settings: Any
) -> tuple[Callable[[], tuple[float, float]], torch.nn.Module]:
    """Return an optimizer step as in `Trainer.train`, on a batch that TRL builds from given completions."""

    def given_rollouts(prompts: list[str], _: Any) -> dict[str, list[Any]]:
        size = work.shape.generations
        return {
            "prompt_ids": [work.prompts[row // size] for row in range(len(prompts))],
            "completion_ids": work.completions,
            "logprobs": [[0.0] * len(completion) for completion in work.completions],
        }

    rows = [{"prompt": str(number)} for number in range(work.shape.prompts)]
    trainer = make_trainer(
        work.shape,
        folder,
        options,
        rows,
        reward=lambda **_: work.rewards,
        rollout_func=given_rollouts,
        micro_batch=micro_batch,
        **settings,
    )
    trainer.one_batch = True
    trainer.create_optimizer_and_scheduler(num_training_steps=trainer.args.max_steps)
    model, accumulation = trainer.model, trainer.args.gradient_accumulation_steps
    if trainer.args.gradient_checkpointing:
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    generation_batch = [row for row in rows for _ in range(work.shape.generations)]

    def step() -> tuple[float, float]:
        loss = sum(trainer.training_step(model, generation_batch, None) for _ in range(accumulation))
        norm = trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
        return float(loss), float(norm)

    return step, model


def their_sampler(
    work: Work, folder: Path, options: Namespace, **settings: Any
) -> tuple[Callable[[], list[list[int]]], torch.nn.Module]:
    """Return a function that samples one generation batch as token ids with TRL, and the model."""
    trainer = make_trainer(work.shape, folder, options, [{"prompt": "0"}] * 2, **BEST, **settings)
    prompts = [prompt for prompt in work.prompts for _ in range(work.shape.generations)]

    def sample() -> list[list[int]]:
        trainer.plan = Plan(work.lengths)
        completions, _ = trainer._generate_single_turn(prompts, None, {}, work.shape.generations)
        return completions

    return sample, trainer.model
