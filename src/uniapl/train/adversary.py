"""The discriminator of a stage with everything that its training needs: optimizer, replay, cadence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import AutoModel, PreTrainedModel

from uniapl.config import Config
from uniapl.discriminator.bradley_terry import (
    AdversaryState,
    BradleyTerry,
    BradleyTerryDiscriminator,
    Comparison,
    Replay,
)
from uniapl.errors import UsageError
from uniapl.train.setup import Materials
from uniapl.train.step import discriminator_step
from uniapl.types import Example, RolloutGroup, derive_seed


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """The discriminator with everything that its own training needs."""

    discriminator: BradleyTerryDiscriminator
    module: nn.Module
    """The discriminator's module, wrapped for several processes."""
    optimizer: Optimizer
    replay: Replay
    state: AdversaryState

    def judge(self, groups: Sequence[RolloutGroup]) -> list[tuple[tuple[float, ...], float | None]]:
        """(logits of the rollouts, logit of the demonstration) of each group."""
        sequences = [(g.example.prompt_ids, r.completion_ids) for g in groups for r in g.rollouts]
        experts = [g.example for g in groups if g.example.demonstration_ids is not None]
        sequences += [(e.prompt_ids, e.demonstration_ids or ()) for e in experts]
        logits = iter(self.discriminator.score(sequences))
        policy = [tuple(next(logits) for _ in g.rollouts) for g in groups]
        expert = [next(logits) if g.example.demonstration_ids is not None else None for g in groups]
        return list(zip(policy, expert, strict=True))

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
        settings = config.discriminator
        fresh = [
            Comparison.of(g)
            for g in groups
            if g.example.demonstration_ids is not None and not is_held_out(g.example, config)
        ]
        losses: list[float] = []
        skipped = 0
        frozen = settings.freeze_step is not None and stage_step >= settings.freeze_step
        if not (self.state.paused or frozen):
            replayed = round(len(fresh) * settings.replay_share / (1 - settings.replay_share))
            for update in range(settings.updates_per_step):
                seed = derive_seed(config.seed, "replay", step, update)
                comparisons = fresh + self.replay.draw(replayed, seed=seed)
                if not comparisons:
                    break
                loss, applied = discriminator_step(
                    accelerator,
                    self.discriminator,
                    self.module,
                    self.optimizer,
                    comparisons,
                    max_grad_norm=settings.max_grad_norm,
                )
                losses.append(loss)
                skipped += not applied
        self.replay.add(fresh)
        return {
            "discriminator/loss": sum(losses) / len(losses) if losses else None,
            "discriminator/updates": len(losses) - skipped,
            "discriminator/skipped": skipped,
            "discriminator/paused": int(self.state.paused),
        }


def is_held_out(example: Example, config: Config) -> bool:
    """Whether the discriminator never learns from this row: drawn by the row's number."""
    return derive_seed(config.seed, "held out", example.row) < config.discriminator.held_out_share * 2**63


def build_adversary(
    config: Config, model: PreTrainedModel, materials: Materials, accelerator: Accelerator
) -> Adversary:
    """An adversary that has learnt nothing yet.

    Args:
        model: The policy, whose copy is the discriminator's trunk unless the configuration names another.
    """
    settings = config.discriminator
    if settings.model_name_or_path is None:
        module = BradleyTerry.copy_of(model)
    else:
        try:
            trunk = AutoModel.from_pretrained(
                settings.model_name_or_path, dtype=torch.float32, use_safetensors=True
            )
        except Exception as error:  # transformers and the Hub client raise many kinds
            raise UsageError(
                f"discriminator.model_name_or_path '{settings.model_name_or_path}' cannot be loaded: {error}"
            ) from error
        module = BradleyTerry(trunk).to(accelerator.device)
    embeddings: Any = module.trunk.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(materials.tokenizer) > rows:
        raise UsageError(
            f"the discriminator knows {rows} tokens, the policy's tokenizer has {len(materials.tokenizer)}: "
            "its backbone must share the policy's vocabulary"
        )
    module.eval()
    optimizer = AdamW(module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    wrapped, prepared = accelerator.prepare(module, optimizer)
    return Adversary(
        discriminator=BradleyTerryDiscriminator(
            module=module,
            pad_id=materials.pad_id,
            max_tokens=config.batching.max_tokens,
            autocast=accelerator.autocast,
        ),
        module=wrapped,
        optimizer=prepared,
        replay=Replay(settings.replay_size),
        state=AdversaryState(),
    )
