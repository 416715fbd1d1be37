"""The discriminator of a stage, and its training if it is trained."""

import functools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers import AutoModel, PreTrainedModel

from uniapl.config import Config, DiscriminatorConfig, ModelConfig
from uniapl.data.streams import is_held_out
from uniapl.discriminator import Discriminator, candidates_of
from uniapl.discriminator.bradley_terry import (
    AdversaryState,
    BradleyTerryDiscriminator,
    Comparison,
    Replay,
    ScoreModel,
    another_example,
    no_context,
)
from uniapl.discriminator.demonstrations import Demonstrations
from uniapl.discriminator.density_ratio import DensityRatio
from uniapl.discriminator.ending import UniformEnding
from uniapl.discriminator.lora import LoraTrunk
from uniapl.discriminator.polar import Polar, PolarFormat
from uniapl.discriminator.remote import Remote
from uniapl.errors import UniAPLError, UsageError
from uniapl.models.loading import ModelSource, check_vocabulary, load_model, load_weights
from uniapl.models.packing import can_pack
from uniapl.models.policy import Policy
from uniapl.models.reference import reference_at_start
from uniapl.training.checkpoint.directory import load_module, load_optimizer, save_module
from uniapl.training.distributed import fsdp
from uniapl.training.inputs import RunInputs
from uniapl.training.optimizer import adamw
from uniapl.training.update.accumulate import OutOfMemoryError
from uniapl.training.update.discriminator_step import discriminator_step, update_metrics
from uniapl.types import Example, RolloutGroup, TokenIds, derive_seed

DISCRIMINATOR_OPTIMIZER = "discriminator_optimizer"
"""Name of the optimizer's checkpoint files, without suffix."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorTrainer:
    """A discriminator that is trained together with the policy."""

    discriminator: BradleyTerryDiscriminator
    wrapped: nn.Module
    """`discriminator.module`, wrapped for DDP if needed; with FSDP2 a sharded copy."""
    optimizer: Optimizer
    replay: Replay
    state: AdversaryState
    """The same object as `Adversary.state`: an out-of-memory error in an update lowers its `max_tokens`."""
    demonstrations: Demonstrations = field(default_factory=Demonstrations)
    """Those that are not held out, in the uniform form; none if only those of a step's prompts are used."""

    def fresh(self, groups: Sequence[RolloutGroup], config: Config, step: int) -> list[Comparison]:
        """A step's comparisons; for the unpaired loss, the rollouts of all prompts without demonstrations.

        Args:
            groups: In the uniform form.
        """
        context, count = self.discriminator.context, config.discriminator.num_mismatched
        groups = [group for group in groups if not is_held_out(group.example, config)]
        if self.discriminator.unpaired:
            return [Comparison.of_rollouts(group, context) for group in groups]
        return [
            Comparison.of(group, context, self._mismatched(group.example, count, step))
            for group in groups
            if group.example.demonstration_ids is not None
        ]

    def drawn(self, count: int, config: Config, step: int, number: int) -> list[Comparison]:
        """Up to `count` demonstrations with their negatives, drawn from all, for one unpaired update."""
        context, mismatched = self.discriminator.context, config.discriminator.num_mismatched
        return [
            Comparison.of(
                RolloutGroup(example=example, rollouts=(), reward_parts={}),
                context,
                self._mismatched(example, mismatched, step, number),
            )
            for example in self.demonstrations.draw(count, "demonstrations", step, number)
        ]

    def _mismatched(self, example: Example, count: int, *names: int) -> list[TokenIds]:
        return [tokens.completion for tokens in self.demonstrations.mismatched(example, count, *names)]

    def update(
        self, accelerator: Accelerator, comparisons: Sequence[Comparison], config: Config
    ) -> tuple[float, bool]:
        """One :func:`discriminator_step`; batches that do not fit in memory are halved, also from then on."""
        unpaired = self.discriminator.unpaired
        smallest = (1 if unpaired else 2) * max(comparison.width for comparison in comparisons)
        while True:
            configured = config.batching.max_tokens_per_micro_batch
            limit = min(configured, self.state.max_tokens or configured)
            try:
                return discriminator_step(
                    accelerator,
                    self.discriminator,
                    self.wrapped,
                    self.optimizer,
                    comparisons,
                    max_grad_norm=config.discriminator.max_grad_norm,
                    max_tokens=limit,
                )
            except OutOfMemoryError:
                if limit <= smallest:
                    raise UniAPLError(
                        "out of memory in the discriminator's update: "
                        f"a {'sequence' if unpaired else 'pair'} of {smallest} tokens does not fit; "
                        "lower rollout.max_completion_length or data.max_demonstration_length, or use a "
                        "smaller discriminator (discriminator.model_name_or_path, discriminator.lora_r)"
                    ) from None
            total = sum(len(c.sequences) for c in comparisons) * smallest
            self.state.max_tokens = min(limit, total) // 2


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """The discriminator of a stage."""

    discriminator: Discriminator
    trainer: DiscriminatorTrainer | None
    """None for a frozen discriminator."""
    state: AdversaryState
    ending: UniformEnding
    """Gives demonstrations and rollouts the form in which the discriminator reads them."""

    @property
    def reads_policy(self) -> bool:
        """Whether it runs the policy itself, whose full parameters must then be gathered."""
        frozen = self.discriminator
        return isinstance(frozen, DensityRatio) and isinstance(frozen.reference, Policy)

    def score(
        self, groups: Sequence[RolloutGroup], states: object = None
    ) -> list[tuple[tuple[float, ...] | None, float | None]]:
        """(logits of the rollouts, logit of the demonstration) per group; None if it has none.

        Equal completions of a prompt are scored once: another batch would round their logits differently.

        Args:
            states: Ignored: these discriminators read the tokens themselves.
        """
        parts = [candidates_of(self.ending.group(group), self.ending.text) for group in groups]
        if self.discriminator.needs_reference:
            parts = [(rollouts if expert else [], expert) for rollouts, expert in parts]
        candidates = [candidate for rollouts, _ in parts for candidate in rollouts]
        candidates += [expert for _, expert in parts if expert]
        keys = [(c.example.prompt_ids, c.completion_ids, c.text, c.reference) for c in candidates]
        distinct = dict(zip(keys, candidates, strict=True))
        scored = dict(zip(distinct, self.discriminator.score([*distinct.values()]), strict=True))
        logits = iter([scored[key] for key in keys])
        policy = [tuple(next(logits) for _ in rollouts) or None for rollouts, _ in parts]
        return [
            (scores, next(logits) if expert else None)
            for scores, (_, expert) in zip(policy, parts, strict=True)
        ]

    def observe(
        self, groups: Sequence[RolloutGroup], pairs: Mapping[str, float], settings: DiscriminatorConfig
    ) -> dict[str, float]:
        """Update the moving averages by a step's logits and pair metrics, and pause or resume training.

        Returns:
            The average that is compared with `min_accuracy`.
        """
        experts = [group.expert_logit for group in groups]
        finite = [logit for logit in experts if logit is not None and math.isfinite(logit)]
        # Held-out demonstrations, if there are any, show what the discriminator has learned of the expert.
        accuracy = "held_out_accuracy" if settings.held_out_fraction else "accuracy"
        self.state.observe(
            accuracy=pairs.get(f"discriminator/{accuracy}"),
            expert_logit=sum(finite) / len(finite) if finite else None,
            band=settings.accuracy_band,
        )
        return {"adversary/accuracy": self.state.accuracy}

    def update(
        self,
        accelerator: Accelerator,
        groups: Sequence[RolloutGroup],
        config: Config,
        step: int,
        stage_step: int,
    ) -> dict[str, Any]:
        """Update on fresh and replayed comparisons, unless paused or frozen; return what to log.

        Args:
            step: Step of the run, which seeds the draw of replayed comparisons.
            stage_step: Step of the stage, which `freeze_after_steps` refers to.
        """
        settings, trainer = config.discriminator, self.trainer
        if trainer is None:
            return {}
        fresh = trainer.fresh([self.ending.group(group) for group in groups], config, step)
        num_updates = 0 if self.state.paused or config.is_frozen(stage_step) else settings.updates_per_step
        num_replayed = round(len(fresh) * settings.replay_fraction / (1 - settings.replay_fraction))
        updates: list[tuple[float, bool]] = []
        for number in range(num_updates):
            seed = derive_seed(config.seed, "replay", step, number)
            if comparisons := fresh + trainer.replay.draw(num_replayed, seed=seed):
                if trainer.discriminator.unpaired:
                    comparisons += trainer.drawn(len(comparisons), config, step, number)
                updates.append(trainer.update(accelerator, comparisons, config))
        trainer.replay.add(fresh)
        return {**update_metrics(updates), "discriminator/paused": int(self.state.paused)}

    def gathered(self) -> AbstractContextManager[None]:
        """The discriminator with its weights; all processes enter and leave together."""
        if self.trainer is None:
            return nullcontext()
        return fsdp.gathered(self.trainer.discriminator.module, self.trainer.wrapped)

    def save(self, directory: Path) -> dict[str, Any]:
        """Write the weights of a trained discriminator; return the rest as JSON values."""
        state: dict[str, Any] = {"adversary": asdict(self.state)}
        if self.trainer is not None:
            save_module(self.trainer.discriminator.module, directory / "discriminator.safetensors")
            state["replay"] = self.trainer.replay.state()
        return state

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """The inverse of :meth:`save`."""
        vars(self.state).update(state["adversary"])
        trainer = self.trainer
        if trainer is None:
            return
        module = trainer.discriminator.module
        with self.gathered():
            load_module(module, directory / "discriminator.safetensors")
            fsdp.scatter(module, trainer.wrapped)
            vocabulary_size = _vocabulary_size(module)
        load_optimizer(trainer.optimizer, directory / DISCRIMINATOR_OPTIMIZER)
        trainer.replay.load(state["replay"])
        if not trainer.discriminator.unpaired:
            # A run whose loss was unpaired kept rollouts of prompts without a demonstration.
            trainer.replay.items = [item for item in trainer.replay.items if item.expert]
        sequences = [ids for item in trainer.replay.items for pair in item.sequences for ids in pair]
        if any(max(ids, default=0) >= vocabulary_size for ids in sequences):
            raise UsageError(
                f"checkpoint '{directory}' cannot be used: its replay contains unknown token ids"
            )


def build_adversary(
    config: Config, policy: Policy, inputs: RunInputs, accelerator: Accelerator, source: ModelSource
) -> Adversary:
    """Build the discriminator that the configuration names.

    Args:
        policy: A Bradley-Terry discriminator copies its trunk unless the configuration names another model.
        source: The weights that the stage started from.
    """
    state, trainer = AdversaryState(), None
    ending = UniformEnding.of(
        inputs.dataset.examples,
        inputs.tokenizer,
        inputs.stop_ids,
        config.rollout.stop_strings,
        getattr(policy.model.config.get_text_config(), "max_position_embeddings", None),
    )
    if config.discriminator.kind == "bradley-terry":
        trainer = _build_trainer(config, policy.model, inputs, accelerator, state, ending)
        discriminator: Discriminator = trainer.discriminator
    else:
        discriminator = _frozen_discriminator(config, policy, inputs, accelerator, source)
    return Adversary(discriminator=discriminator, trainer=trainer, state=state, ending=ending)


def _frozen_discriminator(
    config: Config, policy: Policy, inputs: RunInputs, accelerator: Accelerator, source: ModelSource
) -> Discriminator:
    settings = config.discriminator
    name, max_tokens = settings.model_name_or_path, config.batching.max_tokens_per_micro_batch
    assert name is not None, "check_stage requires it"
    if settings.kind == "remote":
        assert settings.url is not None, "check_stage requires it"
        return Remote(
            url=settings.url,
            server=settings.server,
            model=name.rstrip("/").split("/")[-1],
            format=PolarFormat.load(name, trust_remote_code=settings.trust_remote_code),
            timeout=settings.timeout,
            max_retries=settings.max_retries,
        )
    if settings.kind == "polar":
        return Polar.load(
            name,
            trust_remote_code=settings.trust_remote_code,
            max_tokens=max_tokens,
            device=accelerator.device,
        )
    where = ModelConfig(model_name_or_path=name, trust_remote_code=settings.trust_remote_code)
    expert = load_model(ModelSource.resolve(where)).to(accelerator.device)
    check_vocabulary(expert, inputs.tokenizer)
    at_start = settings.density_ratio_reference == "start"
    teacher = Policy(expert, accelerator.autocast).requires_grad_(False)
    return DensityRatio(
        expert=teacher,
        reference=reference_at_start(policy, source) if at_start else policy,
        pad_id=inputs.pad_id,
        max_tokens=max_tokens,
        packed=config.batching.packing and policy.packs and teacher.packs,
        device=accelerator.device,
        autocast=accelerator.autocast,
    )


def _build_trainer(
    config: Config,
    model: PreTrainedModel,
    inputs: RunInputs,
    accelerator: Accelerator,
    state: AdversaryState,
    ending: UniformEnding,
) -> DiscriminatorTrainer:
    settings = config.discriminator
    if settings.lora_r is not None:
        module = ScoreModel(LoraTrunk(model, settings.lora_r, seed=config.seed)).to(accelerator.device)
    elif settings.model_name_or_path is None:
        module = ScoreModel.copy_of(model, settings.num_layers)
    else:
        trusted = settings.trust_remote_code
        trunk = load_weights(
            AutoModel, "discriminator", settings.model_name_or_path, trust_remote_code=trusted
        )
        module = ScoreModel(trunk).to(accelerator.device)
    vocabulary_size = _vocabulary_size(module)
    if len(inputs.tokenizer) > vocabulary_size:
        raise UsageError(
            f"discriminator.model_name_or_path: the model has {vocabulary_size} token embeddings, but the "
            f"policy's tokenizer has {len(inputs.tokenizer)} tokens; choose a model with the same vocabulary"
        )
    context, demonstrations = no_context, Demonstrations()
    if settings.in_context_demonstration or settings.num_mismatched or not settings.is_paired:
        known = [ending.example(e) for e in inputs.dataset.examples if not is_held_out(e, config)]
        demonstrations = Demonstrations(known, seed=config.seed, context_length=ending.context_length)
        if settings.in_context_demonstration:
            context = another_example(known, config.seed)
    module.eval()
    with accelerator.autocast():
        packs = can_pack(module.trunk)
    make_optimizer = functools.partial(
        adamw, lr=settings.trained_learning_rate, weight_decay=settings.weight_decay
    )
    wrapped, optimizer = fsdp.distribute(accelerator, module, make_optimizer)
    fsdp.release(module, wrapped)
    return DiscriminatorTrainer(
        discriminator=BradleyTerryDiscriminator(
            module=module,
            pad_id=inputs.pad_id,
            max_tokens=config.batching.max_tokens_per_micro_batch,
            unpaired=not settings.is_paired,
            label_smoothing=settings.label_smoothing,
            context=context,
            packed=config.batching.packing and packs,
            autocast=accelerator.autocast,
        ),
        wrapped=wrapped,
        optimizer=optimizer,
        replay=Replay(settings.replay_size),
        state=state,
        demonstrations=demonstrations,
    )


def _vocabulary_size(module: ScoreModel) -> int:
    embeddings: Any = module.trunk.get_input_embeddings()
    return embeddings.weight.shape[0]
