"""The objects of one stage: policy, optimizer, reference, adversary, sampler and schedule."""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from uniapl.config import Config
from uniapl.data.streams import is_held_out
from uniapl.errors import UniAPLError
from uniapl.functional import Multiplier
from uniapl.models.loading import ModelSource
from uniapl.models.policy import Policy
from uniapl.models.reference import Reference, reference_at_start
from uniapl.models.token_states import TokenReader
from uniapl.rollout import Sampler
from uniapl.teacher import Teacher
from uniapl.training.adversary import Adversary, build_adversary
from uniapl.training.build_sampler import build_sampler
from uniapl.training.build_teacher import build_teacher
from uniapl.training.distributed import fsdp
from uniapl.training.distributed.one_step_off import OneStepOffSampler
from uniapl.training.inputs import RunInputs
from uniapl.training.monitor.metrics import pair_metrics
from uniapl.training.optimizer import adamw
from uniapl.training.schedule import Schedule
from uniapl.training.state_adversary import STATE_KINDS, StateAdversary, build_state_adversary, state_layers
from uniapl.training.update.activation_checkpointing import checkpointed_layers
from uniapl.training.update.policy_step import LossSettings
from uniapl.types import RolloutGroup


@dataclass(kw_only=True)
class Stage:
    """One stage of a run."""

    index: int
    """Index of the stage, from 0."""
    model: PreTrainedModel
    """The language model used for sampling, evaluation and saving. With FSDP2 its parameters exist only
    inside :meth:`gathered_policy`."""
    policy: nn.Module
    """The module to train: a :class:`Policy` around `model`, wrapped for DDP if needed; with FSDP2 a sharded
    copy."""
    optimizer: Optimizer
    reader: TokenReader | None
    """Reads completions with the reference, for the KL, for preference pairs and for a discriminator on its
    states. The reference is allocated at the start so that memory does not grow at `reference_step`."""
    loss_settings: LossSettings
    adversary: Adversary | StateAdversary | None
    teacher: Teacher | None
    sampler: Sampler
    schedule: Schedule

    @property
    def config(self) -> Config:
        """The stage's configuration."""
        return self.schedule.config

    @property
    def packing(self) -> bool:
        """Whether micro-batches are packed: `batching.packing` is set and the model supports it."""
        # The policy may be wrapped.
        policies = (module for module in self.policy.modules() if isinstance(module, Policy))
        return self.config.batching.packing and next(policies).packs

    @property
    def reference(self) -> Reference | None:
        """The reference of the KL term."""
        return self.reader.model if self.reader is not None else None

    @property
    def one_step_off(self) -> OneStepOffSampler | None:
        """The sampler if it samples one step ahead, else None."""
        return self.sampler if isinstance(self.sampler, OneStepOffSampler) else None

    @property
    def selects_prompts(self) -> bool:
        """Whether the prompts of a step depend on the pass rates of the steps before."""
        return self.config.batching.prompt_selection == "informative"

    def check_sampler(self) -> None:
        """Sample once to report errors early, unless no remaining step uses rollouts.

        Raises:
            UsageError: It cannot sample from this model or on this machine.
        """
        if self.config.objective.uses_rollouts and not self.schedule.ended:
            with self.gathered_policy():
                self.sampler.check()

    def wait_for_rollouts(self) -> UniAPLError | None:
        """Wait for the next step's rollouts, because checkpoints include them; return its error."""
        try:
            if self.one_step_off is not None:
                self.one_step_off.wait()
        except UniAPLError as error:
            return error
        return None

    def start_step(self) -> None:
        """Set the learning rate; at `reference_step`, copy the policy to the reference."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate
        if self.reference is None or self.schedule.uses_reference:
            return
        if self.schedule.step >= self.config.reference_step:
            with self.gathered_policy():
                self.reference.copy_policy()
            self.schedule.uses_reference = True

    def update_controllers(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Update the discriminator's moving averages and flags, and lambda_adv, from the step's pairs.

        `mix` and `update_discriminator` use the updated values in this step.

        Returns:
            The metrics of the pairs and of the controller of lambda_adv.
        """
        held_out = pair_metrics([group for group in groups if is_held_out(group.example, self.config)])
        pairs = pair_metrics(groups) | {k.replace("/", "/held_out_"): v for k, v in held_out.items()}
        if self.adversary is not None and groups:
            pairs |= self.adversary.observe(groups, pairs, self.config.discriminator)
            self.adversary.state.compare_accuracy(self.config.discriminator.min_accuracy)
        return pairs | self.schedule.control_lambda(pairs.get("discriminator/pair_win_rate"))

    def gathered_policy(self) -> AbstractContextManager[None]:
        """Gather the full parameters into `model` (no-op without FSDP2).

        All processes enter and leave together.
        """
        return fsdp.gathered(self.model, self.policy)


def build_stage(
    config: Config,
    index: int,
    model: PreTrainedModel,
    inputs: RunInputs,
    accelerator: Accelerator,
    *,
    start: Path | None,
) -> Stage:
    """Build a stage at its first step.

    Args:
        model: The policy's language model with its current weights, on the device.
        start: Directory with the weights that the stage started from; None for the run's initial model.
    """
    objective, optim = config.objective, config.optim
    if optim.gradient_checkpointing:
        checkpointed_layers(model)
    inner = Policy(model, accelerator.autocast)
    source = inputs.source.with_weights(start)
    reader = _reader(config, inner, inputs, accelerator, source)
    adversary = _adversary(config, inner, inputs, accelerator, source, reader)
    make_optimizer = functools.partial(
        adamw,
        lr=optim.learning_rate,
        betas=(optim.adam_beta1, optim.adam_beta2),
        weight_decay=optim.weight_decay,
    )
    policy, optimizer = fsdp.distribute(accelerator, inner, make_optimizer)
    sampler = build_sampler(config, model, inputs, accelerator)
    fsdp.release(model, policy)
    return Stage(
        index=index,
        model=model,
        policy=policy,
        optimizer=optimizer,
        reader=reader,
        loss_settings=LossSettings(
            clip_low=objective.epsilon,
            clip_high=objective.clip_high,
            loss_type=objective.loss_type,
            max_completion_length=config.rollout.max_completion_length,
            importance_sampling_level=objective.importance_sampling_level,
            token_weight=objective.sft_token_weight,
            importance_cap=config.rollout.importance_cap,
            beta_pref=objective.beta_pref if objective.pref_weight else 0.0,
            max_grad_norm=optim.max_grad_norm,
        ),
        adversary=adversary,
        teacher=build_teacher(config, accelerator),
        sampler=sampler,
        schedule=Schedule(
            config=config,
            adversary=adversary,
            multiplier=Multiplier(value=objective.lambda_adv),
            uses_reference=reader is not None and not config.reference_step,
        ),
    )


def _reader(
    config: Config, policy: Policy, inputs: RunInputs, accelerator: Accelerator, source: ModelSource
) -> TokenReader | None:
    """The reader of the KL reference; None if no loss component and no discriminator needs one."""
    on_states = config.objective.lambda_adv > 0 and config.discriminator.kind in STATE_KINDS
    if not config.objective.uses_reference and not on_states:
        return None
    return TokenReader(
        model=reference_at_start(policy, source),
        layers=state_layers(config.discriminator, policy.model) if on_states else (),
        temperature=config.rollout.temperature if config.objective.uses_rollouts else 1.0,
        pad_id=inputs.pad_id,
        max_tokens=config.batching.max_tokens_per_micro_batch,
        packed=config.batching.packing and policy.packs,
        device=accelerator.device,
        autocast=accelerator.autocast,
    )


def _adversary(
    config: Config,
    policy: Policy,
    inputs: RunInputs,
    accelerator: Accelerator,
    source: ModelSource,
    reader: TokenReader | None,
) -> Adversary | StateAdversary | None:
    if not config.objective.lambda_adv:
        return None
    if config.discriminator.kind not in STATE_KINDS:
        return build_adversary(config, policy, inputs, accelerator, source)
    assert reader is not None
    return build_state_adversary(config, reader, inputs, accelerator, policy.model.config.get_text_config())
