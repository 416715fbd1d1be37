"""Discriminators that read the reference's states of completions: a trained head, or the likelihood alone."""

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer

from uniapl.config import Config, DiscriminatorConfig
from uniapl.data.batching import batch_by_length
from uniapl.data.streams import is_held_out
from uniapl.discriminator.bradley_terry import AdversaryState
from uniapl.discriminator.head import StateHead, head_logits
from uniapl.errors import UniAPLError, UsageError
from uniapl.models.token_states import TokenReader, TokenStates
from uniapl.training.checkpoint.directory import load_module, load_optimizer, save_module
from uniapl.training.demonstration_states import MEASURED_MISMATCHES, DemonstrationStates
from uniapl.training.distributed import fsdp
from uniapl.training.inputs import RunInputs
from uniapl.training.optimizer import adamw
from uniapl.training.update.accumulate import OutOfMemoryError
from uniapl.training.update.credit import passing
from uniapl.training.update.discriminator_step import update_metrics
from uniapl.training.update.head_step import head_step
from uniapl.types import RolloutGroup, Tokens, derive_seed

EMPTY = -100.0
"""Nats per token of a text without tokens: u is 0, because no token would otherwise be the likeliest text."""
STATE_KINDS = ("head", "reference-likelihood")
"""Kinds of discriminators on the reference's states."""


@dataclass(frozen=True, kw_only=True)
class HeadTrainer:
    """A head that is trained together with the policy."""

    module: StateHead
    wrapped: nn.Module
    """`module`, wrapped for DDP if needed; with FSDP2 a sharded copy."""
    optimizer: Optimizer
    demonstrations: DemonstrationStates
    """The states that it learns from, and on which it is measured."""


@dataclass(kw_only=True)
class StateAdversary:
    """The discriminator of a stage, on the states that the reference's forward pass gives."""

    trainer: HeadTrainer | None
    """The head; None for the likelihood, which is not trained."""
    likelihood_scale: float
    """d(x, y) is this times the mean log-probability under the reference, without a head."""
    text_length: Callable[[Tokens], int]
    """Written tokens of a completion without what closed it, which must not identify the writer."""
    max_tokens: int
    state: AdversaryState
    accelerator: Accelerator
    measured: tuple[float, int] = (0.0, 0)
    """See `_measure`; from `score` to `observe` of a step."""
    fresh: list[list[TokenStates]] = field(default_factory=list)
    """States of this process's rollouts, from `score` to `update` of a step."""

    @property
    def reads_policy(self) -> bool:
        """Whether it runs the policy itself: never."""
        return False

    def score(
        self, groups: Sequence[RolloutGroup], states: Sequence[Sequence[TokenStates]] | None
    ) -> list[tuple[tuple[float, ...] | None, float | None]]:
        """(logits of the rollouts, logit of the demonstration) per group.

        Args:
            states: The reference's states of a group's rollouts, then of its demonstration if it has one;
                None before the reference exists, when nothing has a logit.
        """
        if states is None:
            self.fresh = []
            return [(None, None) for _ in groups]
        texts: list[list[TokenStates]] = []
        for group, parts in zip(groups, states, strict=True):
            tokens = group.tokens(demonstration=True)
            texts.append([p.first(self.text_length(t)) for p, t in zip(parts, tokens, strict=True)])
        logits = iter(self.logits([text for parts in texts for text in parts]))
        scores = [tuple(next(logits) for _ in parts) for parts in texts]
        sizes = [len(group.rollouts) for group in groups]
        self.fresh = [parts[:size] for parts, size in zip(texts, sizes, strict=True)]
        self.measured = self._measure()
        return [(s[:size], s[size] if len(s) > size else None) for s, size in zip(scores, sizes, strict=True)]

    @torch.no_grad()
    def logits(self, completions: Sequence[TokenStates]) -> list[float]:
        """The logit of each completion."""
        if self.trainer is None:
            means = [float(c.logprobs.double().mean()) if len(c.logprobs) else EMPTY for c in completions]
            return [self.likelihood_scale * mean for mean in means]
        found = [0.0] * len(completions)
        lengths = [max(1, len(c.logprobs)) for c in completions]
        for batch in batch_by_length(lengths, max_tokens=self.max_tokens):
            logits = head_logits(self.trainer.module, [completions[index] for index in batch])
            for index, logit in zip(batch, logits.tolist(), strict=True):
                found[index] = logit
        return found

    def observe(
        self, groups: Sequence[RolloutGroup], pairs: Mapping[str, float], settings: DiscriminatorConfig
    ) -> dict[str, float]:
        """Update the moving average of the demonstrations' logits, and what the head knows of relevance."""
        logits = [group.expert_logit for group in groups]
        experts = [logit for logit in logits if logit is not None and math.isfinite(logit)]
        if not experts:
            return {}
        self.state.observe(
            accuracy=None, expert_logit=sum(experts) / len(experts), band=settings.accuracy_band
        )
        if self.trainer is None:
            self.state.accuracy = 1.0
            return {}
        # Counts of several processes: all of them must come to the same result.
        wins, pairs_measured = (
            sum(gather_object([count])) if self.accelerator.num_processes > 1 else count
            for count in self.measured
        )
        self.state.accuracy = wins / pairs_measured if pairs_measured else 0.5
        accuracy = self.state.accuracy
        return {"discriminator/held_out_mismatched_accuracy": accuracy, "adversary/accuracy": accuracy}

    def _measure(self) -> tuple[float, int]:
        """Number of held-out pairs of a demonstration and a mismatched one in which the former wins, and of
        all pairs; this process's part of them."""
        if self.trainer is None:
            return (0.0, 0)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        known = self.trainer.demonstrations
        states = [known.of(example) for example in known.measured[rank::processes]]
        pairs = [(s.demonstration, x) for s in states for x in s.mismatched[:MEASURED_MISMATCHES]]
        logits = self.logits([item for pair in pairs for item in pair])
        own, others = logits[::2], logits[1::2]
        return sum((a > b) + (a == b) / 2 for a, b in zip(own, others, strict=True)), len(pairs)

    def update(
        self,
        accelerator: Accelerator,
        groups: Sequence[RolloutGroup],
        config: Config,
        step: int,
        stage_step: int,
    ) -> dict[str, Any]:
        """Update the head on demonstrations, passing rollouts and mismatched demonstrations."""
        settings, trainer = config.discriminator, self.trainer
        if trainer is None or not any(group.policy_logits for group in groups):
            return {}
        accepted = [
            [] if is_held_out(group.example, config) else [*passing(group, config.objective)]
            for group in groups
        ]
        rank, processes = accelerator.process_index, accelerator.num_processes
        fresh = [
            item
            for parts, accepts in zip(self.fresh, accepted[rank::processes], strict=True)
            for item, passes in zip(parts, accepts or [False] * len(parts), strict=True)
            if passes
        ]
        num_passing = sum(sum(accepts) for accepts in accepted)
        updates: list[tuple[float, bool]] = []
        for number in range(0 if config.is_frozen(stage_step) else settings.updates_per_step):
            rng = random.Random(derive_seed(config.seed, "head", step, number))
            train = trainer.demonstrations.train
            drawn = rng.sample(train, min(len(train), max(len(groups), num_passing)))
            states = [trainer.demonstrations.of(example) for example in drawn[rank::processes]]
            chosen = [rng.random() for _ in drawn][rank::processes]
            others = [s.mismatched[: settings.num_mismatched] for s in states]
            mismatched = [m[int(x * len(m))] for m, x in zip(others, chosen, strict=True) if m]
            negatives = [*fresh, *mismatched, *(s.rejected for s in states if s.rejected)]
            num_others = len(negatives) - len(fresh)
            if processes > 1:
                num_others = sum(gather_object([num_others]))
            counts = {"expert": len(drawn), "negative": num_passing + num_others}
            if not counts["negative"]:
                continue  # Demonstrations alone would only raise every logit.
            updates.append(
                self._head_step(trainer, [s.demonstration for s in states], negatives, counts, settings)
            )
        self.fresh = []
        return update_metrics(updates)

    def _head_step(
        self,
        trainer: HeadTrainer,
        experts: Sequence[TokenStates],
        negatives: Sequence[TokenStates],
        counts: dict[str, int],
        settings: DiscriminatorConfig,
    ) -> tuple[float, bool]:
        """One :func:`head_step`; batches that do not fit in memory are halved, also from then on."""
        while True:
            limit = min(self.max_tokens, self.state.max_tokens or self.max_tokens)
            try:
                return head_step(
                    self.accelerator,
                    trainer.wrapped,
                    trainer.optimizer,
                    experts,
                    negatives,
                    counts=counts,
                    max_grad_norm=settings.max_grad_norm,
                    max_tokens=limit,
                )
            except OutOfMemoryError:
                if limit <= 1:
                    raise UniAPLError(
                        "out of memory in the update of the discriminator's head: one completion does not "
                        "fit; lower rollout.max_completion_length or data.max_demonstration_length"
                    ) from None
                self.state.max_tokens = limit // 2

    def gathered(self) -> AbstractContextManager[None]:
        """The head with its weights; all processes enter and leave together."""
        if self.trainer is None:
            return nullcontext()
        return fsdp.gathered(self.trainer.module, self.trainer.wrapped)

    def save(self, directory: Path) -> dict[str, Any]:
        """Write the head's weights; return the rest as JSON values."""
        if self.trainer is not None:
            save_module(self.trainer.module, directory / "discriminator.safetensors")
        return {"adversary": asdict(self.state)}

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """The inverse of :meth:`save`."""
        vars(self.state).update(state["adversary"])
        if self.trainer is not None:
            with self.gathered():
                load_module(self.trainer.module, directory / "discriminator.safetensors")
                fsdp.scatter(self.trainer.module, self.trainer.wrapped)
            load_optimizer(self.trainer.optimizer, directory / "discriminator_optimizer")


def state_layers(settings: DiscriminatorConfig, model: Any) -> tuple[int, ...]:
    """The decoder layers that the discriminator reads, from 1.

    Raises:
        UsageError: The model does not have a configured layer.
    """
    if settings.kind != "head":
        return ()
    count = model.config.get_text_config().num_hidden_layers
    layers = tuple(sorted(set(settings.layers))) or (max(1, round(2 * count / 3)),)
    if layers[0] < 1 or layers[-1] > count:
        raise UsageError(f"discriminator.layers: the model has layers 1 to {count}, got {[*settings.layers]}")
    return layers


def build_state_adversary(
    config: Config, reader: TokenReader, inputs: RunInputs, accelerator: Accelerator, text_config: Any
) -> StateAdversary:
    """Build the head, or the likelihood, that the configuration names.

    Args:
        text_config: The configuration of the reference's language model.
    """
    settings = config.discriminator

    def text_length(tokens: Tokens) -> int:
        ids = tokens.completion
        closing = len(ids) - inputs.text_length(ids, stop_strings=config.rollout.stop_strings)
        return tokens.num_written - (closing if tokens.is_written[-1:] == [True] else 0)

    def read(sequences: Sequence[Tokens]) -> list[TokenStates]:
        states = reader.read(sequences)
        return [s.first(text_length(tokens)) for s, tokens in zip(states, sequences, strict=True)]

    trainer = None
    if settings.kind == "head":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "head"))
            module = StateHead(
                len(reader.layers) * text_config.hidden_size,
                log_probability_features=settings.log_probability_features,
            ).to(accelerator.device)
        make_optimizer = functools.partial(
            adamw, lr=settings.trained_learning_rate, weight_decay=settings.weight_decay
        )
        wrapped, optimizer = fsdp.distribute(accelerator, module, make_optimizer)
        fsdp.release(module, wrapped)
        demonstrations = DemonstrationStates(
            [example for example in inputs.dataset.examples if example.demonstration_ids is not None],
            held_out=functools.partial(is_held_out, config=config),
            read=read,
            seed=config.seed,
            num_mismatched=settings.num_mismatched,
            context_length=getattr(text_config, "max_position_embeddings", None),
        )
        trainer = HeadTrainer(
            module=module, wrapped=wrapped, optimizer=optimizer, demonstrations=demonstrations
        )
    return StateAdversary(
        trainer=trainer,
        likelihood_scale=settings.likelihood_scale,
        text_length=text_length,
        max_tokens=config.batching.max_tokens_per_micro_batch,
        state=AdversaryState(),
        accelerator=accelerator,
    )
