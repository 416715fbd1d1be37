"""The discriminator of a stage with everything that its training needs: optimizer, replay, cadence."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import AutoModel, PreTrainedModel

from uniapl.config import Config, ModelConfig
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
from uniapl.discriminator.density_ratio import DensityRatio
from uniapl.discriminator.lora import LoraTrunk
from uniapl.discriminator.polar import Polar, PolarFormat
from uniapl.discriminator.remote import Remote
from uniapl.errors import UniAPLError, UsageError
from uniapl.models.loading import check_vocabulary, from_pretrained, load_model
from uniapl.models.packing import can_pack
from uniapl.models.policy import Policy
from uniapl.models.reference import reference_at_start
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.distributed import fsdp as sharding
from uniapl.training.inputs import RunInputs
from uniapl.training.update.accumulate import OutOfMemoryError
from uniapl.training.update.discriminator_step import discriminator_step
from uniapl.types import RolloutGroup, TokenIds, derive_seed

DISCRIMINATOR_OPTIMIZER = "discriminator_optimizer"
"""Files of a checkpoint, without their endings, as in `stage`."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorTrainer:
    """What the co-trained discriminator learns with."""

    discriminator: BradleyTerryDiscriminator
    module: nn.Module
    """The discriminator's module, wrapped for several processes, or its sharded twin."""
    optimizer: Optimizer
    replay: Replay


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """The discriminator, and what its training needs where it is trained."""

    discriminator: Discriminator
    learner: DiscriminatorTrainer | None
    """None: it is frozen."""
    state: AdversaryState
    decode: Callable[[TokenIds], str]
    """As rollouts are decoded."""

    def score(self, groups: Sequence[RolloutGroup]) -> list[tuple[tuple[float, ...] | None, float | None]]:
        """(logits of the rollouts, logit of the demonstration) of each group; None for what has none."""
        parts = [candidates_of(group, self.decode) for group in groups]
        if self.discriminator.needs_reference:
            parts = [(rollouts if expert else [], expert) for rollouts, expert in parts]
        candidates = [candidate for rollouts, _ in parts for candidate in rollouts]
        candidates += [expert for _, expert in parts if expert]
        logits = iter(self.discriminator.score(candidates))
        policy = [tuple(next(logits) for _ in rollouts) or None for rollouts, _ in parts]
        return [
            (scores, next(logits) if expert else None)
            for scores, (_, expert) in zip(policy, parts, strict=True)
        ]

    def learn(
        self,
        accelerator: Accelerator,
        groups: Sequence[RolloutGroup],
        config: Config,
        step: int,
        stage_step: int,
    ) -> dict[str, Any]:
        """Its updates of one step: fresh comparisons and a share of older ones, unless paused or frozen.

        Args:
            step: Of the run; seeds the draw of older comparisons.
            stage_step: Of the stage; freezing is counted in these.
        """
        learner, settings = self.learner, config.discriminator
        if learner is None:
            return {}
        fresh = [
            Comparison.of(g, learner.discriminator.context)
            for g in groups
            if g.example.demonstration_ids is not None and not is_held_out(g.example, config)
        ]
        losses: list[float] = []
        skipped = 0
        frozen = settings.freeze_after_steps is not None and stage_step >= settings.freeze_after_steps
        if not (self.state.paused or frozen):
            replayed = round(len(fresh) * settings.replay_fraction / (1 - settings.replay_fraction))
            for update in range(settings.updates_per_step):
                seed = derive_seed(config.seed, "replay", step, update)
                comparisons = fresh + learner.replay.draw(replayed, seed=seed)
                if not comparisons:
                    break
                loss, applied = self._update(accelerator, learner, comparisons, config)
                losses.append(loss)
                skipped += not applied
        learner.replay.add(fresh)
        return {
            "discriminator/loss": sum(losses) / len(losses) if losses else None,
            "discriminator/updates": len(losses) - skipped,
            "discriminator/skipped": skipped,
            "discriminator/paused": int(self.state.paused),
        }

    def _update(
        self,
        accelerator: Accelerator,
        learner: DiscriminatorTrainer,
        comparisons: Sequence[Comparison],
        config: Config,
    ) -> tuple[float, bool]:
        """One update, in smaller batches from the first one on that does not fit in memory."""
        smallest = 2 * max(comparison.width for comparison in comparisons)
        while True:
            limit = min(
                config.batching.max_tokens_per_micro_batch,
                self.state.max_tokens or config.batching.max_tokens_per_micro_batch,
            )
            try:
                return discriminator_step(
                    accelerator,
                    learner.discriminator,
                    learner.module,
                    learner.optimizer,
                    comparisons,
                    max_grad_norm=config.discriminator.max_grad_norm,
                    max_tokens=limit,
                )
            except OutOfMemoryError:
                if limit <= smallest:
                    raise UniAPLError(
                        f"out of memory in the discriminator's update: a pair of {smallest} tokens does not "
                        "fit; lower rollout.max_completion_length or data.max_demonstration_length, or give "
                        "it a smaller backbone (discriminator.model_name_or_path, lora_r)"
                    ) from None
            total = sum(len(c.sequences) for c in comparisons) * smallest
            self.state.max_tokens = min(limit, total) // 2

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """The discriminator with its weights, where it is sharded; all processes enter and leave together."""
        if self.learner is None:
            yield
            return
        with sharding.gathered(self.learner.discriminator.module, self.learner.module):
            yield

    def save(self, directory: Path) -> dict[str, Any]:
        """Write its weights below `directory`; return the rest, as JSON values."""
        if self.learner is None:
            return {"adversary": asdict(self.state)}
        checkpoint.save_module(self.learner.discriminator.module, directory / "discriminator.safetensors")
        return {"adversary": asdict(self.state), "replay": self.learner.replay.state()}

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """The inverse of :meth:`save`."""
        vars(self.state).update(state["adversary"])
        if self.learner is not None:
            module = self.learner.discriminator.module
            with self.gathered():
                checkpoint.load_module(module, directory / "discriminator.safetensors")
                sharding.scatter(module, self.learner.module)
                embeddings: Any = module.trunk.get_input_embeddings()
                known = embeddings.weight.shape[0]
            checkpoint.load_optimizer(self.learner.optimizer, directory / DISCRIMINATOR_OPTIMIZER)
            self.learner.replay.load(state["replay"])
            every = [ids for item in self.learner.replay.items for pair in item.sequences for ids in pair]
            if any(max(ids, default=0) >= known for ids in every):
                raise UsageError(f"checkpoint '{directory}' cannot be used: its replay holds unknown tokens")


def build_adversary(
    config: Config,
    policy: Policy,
    inputs: RunInputs,
    accelerator: Accelerator,
    *,
    start: Path | None,
) -> Adversary:
    """An adversary that has learnt nothing yet.

    Args:
        policy: Whose trunk is copied, unless the configuration names another.
        start: Directory with the weights that the stage started from; None for the run's own start.
    """
    settings = config.discriminator

    def decode(ids: TokenIds) -> str:
        return str(inputs.tokenizer.decode(list(ids), skip_special_tokens=True))

    if settings.kind == "bradley-terry":
        learner = _build_trainer(config, policy.model, inputs, accelerator)
        return Adversary(
            discriminator=learner.discriminator, learner=learner, state=AdversaryState(), decode=decode
        )
    name = settings.model_name_or_path
    assert name is not None, "check_stage asks for it"
    max_tokens = config.batching.max_tokens_per_micro_batch
    if settings.kind == "remote":
        assert settings.url is not None
        discriminator: Discriminator = Remote(
            url=settings.url,
            server=settings.server,
            model=name.rstrip("/").split("/")[-1],
            format=PolarFormat.load(name, trust_remote_code=settings.trust_remote_code),
            timeout=settings.timeout,
            max_retries=settings.max_retries,
        )
    elif settings.kind == "polar":
        discriminator = Polar.load(
            name,
            trust_remote_code=settings.trust_remote_code,
            max_tokens=max_tokens,
            device=accelerator.device,
        )
    else:
        where = ModelConfig(model_name_or_path=name, trust_remote_code=settings.trust_remote_code)
        expert = load_model(where).to(accelerator.device)
        check_vocabulary(expert, inputs.tokenizer)
        at_start = settings.density_ratio_reference == "start"
        teacher = Policy(expert, accelerator.autocast).requires_grad_(False)
        discriminator = DensityRatio(
            expert=teacher,
            reference=reference_at_start(policy, config.model, start) if at_start else policy,
            pad_id=inputs.pad_id,
            max_tokens=max_tokens,
            packed=config.batching.packing and policy.packs and teacher.packs,
            device=accelerator.device,
            autocast=accelerator.autocast,
        )
    return Adversary(discriminator=discriminator, learner=None, state=AdversaryState(), decode=decode)


def _build_trainer(
    config: Config, model: PreTrainedModel, inputs: RunInputs, accelerator: Accelerator
) -> DiscriminatorTrainer:
    settings = config.discriminator
    if settings.lora_r is not None:
        module = ScoreModel(LoraTrunk(model, settings.lora_r, seed=config.seed)).to(accelerator.device)
    elif settings.model_name_or_path is None:
        module = ScoreModel.copy_of(model)
    else:
        trunk = from_pretrained(
            AutoModel.from_pretrained,
            "discriminator",
            settings.model_name_or_path,
            trust_remote_code=settings.trust_remote_code,
            dtype=torch.float32,
            use_safetensors=True,
        )
        module = ScoreModel(trunk).to(accelerator.device)
    embeddings: Any = module.trunk.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(inputs.tokenizer) > rows:
        raise UsageError(
            f"the discriminator knows {rows} tokens, the policy's tokenizer has {len(inputs.tokenizer)}: "
            "its backbone must share the policy's vocabulary"
        )
    context = no_context
    if settings.in_context_demonstration:
        known = [example for example in inputs.dataset.examples if not is_held_out(example, config)]
        context = another_example(known, config.seed)
    module.eval()
    with accelerator.autocast():
        packs = can_pack(module.trunk)
    wrapped, optimizer = sharding.distribute(
        accelerator,
        module,
        lambda parameters: AdamW(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        ),
    )
    sharding.release(module, wrapped)
    return DiscriminatorTrainer(
        discriminator=BradleyTerryDiscriminator(
            module=module,
            pad_id=inputs.pad_id,
            max_tokens=config.batching.max_tokens_per_micro_batch,
            label_smoothing=settings.label_smoothing,
            context=context,
            packed=config.batching.packing and packs,
            autocast=accelerator.autocast,
        ),
        module=wrapped,
        optimizer=optimizer,
        replay=Replay(settings.replay_size),
    )
