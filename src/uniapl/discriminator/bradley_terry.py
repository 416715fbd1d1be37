"""The co-trained discriminator: its model, its loss, its replay and its accuracy band."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from uniapl.data.batching import pad_right, spans_of
from uniapl.discriminator import Candidate, batched_logits
from uniapl.discriminator.lora import LoraTrunk
from uniapl.errors import UsageError
from uniapl.functional import bradley_terry_loss, logistic_losses
from uniapl.models.lora import merge_in_place
from uniapl.models.packing import Packing, packed_hidden
from uniapl.models.policy import decoder_layers, keep_first_layers
from uniapl.types import Example, RolloutGroup, Span, TokenIds, derive_seed
from uniapl.untyped import items_of

Tokens = tuple[TokenIds, TokenIds]
"""Prompt ids and completion ids of a sequence to score."""

Context = Callable[[Example], TokenIds]
"""Returns the token ids in front of an example's prompt."""

ACCURACY_DECAY = 0.9
"""Decay of the moving averages in :class:`AdversaryState`: about the last ten steps. Our choice."""
ACCURACY_MARGIN = 0.05
"""Distance below `min_accuracy` at which an accurate discriminator becomes inaccurate: about twice the
standard deviation of the moving average, so that noise does not switch lambda off and on. Our choice."""


def no_context(example: Example) -> TokenIds:
    """Return no token ids."""
    return ()


def another_example(examples: Sequence[Example], seed: int) -> Context:
    """Return a context that shows the expert's style: another prompt with its demonstration.

    A prompt always gets the same context, never its own demonstration, which would reveal the expert by
    occurring twice. Source: our choice, for discriminators with one demonstration per prompt.

    Raises:
        UsageError: Fewer than two prompts have a demonstration.
    """
    known = {e.prompt_ids: e.demonstration_ids for e in examples if e.demonstration_ids is not None}
    if len(known) < 2:
        raise UsageError(
            "discriminator.in_context_demonstration needs demonstrations of at least two different prompts"
        )
    prompts = list(known)

    def context(example: Example) -> TokenIds:
        start = derive_seed(seed, "context", *example.prompt_ids)
        for offset in range(len(prompts)):
            prompt = prompts[(start + offset) % len(prompts)]
            # An equal demonstration of another prompt would reveal the expert as well.
            if prompt != example.prompt_ids and known[prompt] != example.demonstration_ids:
                return prompt + known[prompt]
        return ()

    return context


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A demonstration and negatives of the same prompt; paired, there is one pair per negative."""

    prompt_ids: TokenIds
    """The context and the prompt."""
    demonstration_ids: TokenIds | None
    """None for negatives only, which the unpaired loss can learn from."""
    completions: tuple[TokenIds, ...]
    """The negatives."""

    @staticmethod
    def of(group: RolloutGroup, context: Context, mismatched: Sequence[TokenIds] = ()) -> "Comparison":
        """Compare a group's demonstration with its rollouts and with other negatives.

        Args:
            group: In the uniform form (`discriminator.ending.UniformEnding`), like the context's examples.
            context: The token ids in front of the prompt.
            mismatched: Demonstrations of other prompts, which are negatives, as is the rejected completion.
        """
        rejected = () if group.example.rejected_ids is None else (group.example.rejected_ids,)
        rollouts = Comparison.of_rollouts(group, context)
        return replace(
            rollouts,
            demonstration_ids=group.example.demonstration_ids,
            completions=(*rollouts.completions, *rejected, *mismatched),
        )

    @staticmethod
    def of_rollouts(group: RolloutGroup, context: Context) -> "Comparison":
        """A group's rollouts as negatives, without its demonstration."""
        return Comparison(
            prompt_ids=context(group.example) + group.example.prompt_ids,
            demonstration_ids=None,
            completions=tuple(rollout.completion_ids for rollout in group.rollouts),
        )

    @property
    def expert(self) -> tuple[TokenIds, ...]:
        """The demonstration, if there is one."""
        return () if self.demonstration_ids is None else (self.demonstration_ids,)

    @property
    def sequences(self) -> list[Tokens]:
        """The demonstration, if there is one, then the negatives."""
        return [(self.prompt_ids, ids) for ids in (*self.expert, *self.completions)]

    @property
    def width(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.prompt_ids) + max(map(len, (*self.expert, *self.completions)), default=0)

    def split(self, max_tokens: int) -> list["Comparison"]:
        """Split into comparisons of at most `max_tokens` padded tokens, or of one negative."""
        size = max(1, max_tokens // self.width - len(self.expert))
        return [
            replace(self, completions=self.completions[start : start + size])
            for start in range(0, max(1, len(self.completions)), size)
        ]

    def apart(self) -> list["Comparison"]:
        """The demonstration, if there is one, and the negatives, if there are any, one without the other."""
        expert: list[Comparison] = [replace(self, completions=())] if self.expert else []
        return [*expert, replace(self, demonstration_ids=None)] if self.completions else expert


class ScoreModel(nn.Module):
    """A trunk and a linear head on the hidden state of the last token.

    Source: GAD (arXiv 2511.10643), where a copy of the student performed best. The head starts at zero, so
    that every win probability is 0.5 at first. It has no bias, because only differences of logits matter.
    """

    def __init__(self, trunk: PreTrainedModel | LoraTrunk) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(cast("Any", trunk.config).get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        self.takes_positions = "position_ids" in inspect.signature(trunk.forward).parameters

    @staticmethod
    def copy_of(model: PreTrainedModel, num_layers: int | None = None) -> "ScoreModel":
        """Copy the trunk of a language model, or its first layers, with its adapter merged."""
        if model.base_model is model:
            raise UsageError(
                f"{type(model).__name__} has no trunk without its head: set discriminator.model_name_or_path "
                "to another model"
            )
        # deepcopy takes what its memo already has, so that layers which are removed are never copied.
        memo: dict[int, Any] = {}
        if num_layers is not None:
            memo = {id(layer): layer for layer in list(decoder_layers(model.base_model))[num_layers:]}
        trunk: Any = copy.deepcopy(model.base_model, memo)
        if num_layers is not None:
            keep_first_layers(trunk, num_layers)
        merge_in_place(trunk)
        return ScoreModel(trunk).to(model.device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, spans: Sequence[Span] = ()) -> Tensor:
        """Return the logits [B] of right-padded rows, which are read packed if spans are given.

        The last token is found by length, because a completion may end with the pad token.
        """
        last = attention_mask.sum(-1) - 1
        rows = torch.arange(len(last), device=last.device)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        if spans:
            packing = Packing(spans, input_ids.shape[1], input_ids.device)
            hidden = packed_hidden(self.trunk, input_ids, positions, packing)[packing.slots[rows, last]]
        else:
            optional = {"position_ids": positions} if self.takes_positions else {}
            hidden = self.trunk(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **optional
            ).last_hidden_state[rows, last]
        # In fp32 also under autocast: bf16 would round away the small differences that become the credit.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float()).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class BradleyTerryDiscriminator:
    """Scores with a :class:`ScoreModel`, and computes its training loss."""

    needs_reference: ClassVar[bool] = False
    module: ScoreModel
    pad_id: int
    max_tokens: int
    """Tokens per batch; a batch has at least one row for scoring, one pair for the paired loss."""
    unpaired: bool = False
    """Classify each sequence, instead of comparing those of a prompt."""
    label_smoothing: float = 0.0
    """Of the paired loss."""
    context: Context = no_context
    packed: bool = False
    """Read packed rows, which the trunk must support (:func:`uniapl.models.packing.can_pack`)."""
    autocast: Callable[..., contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        """Return the logit of each candidate. See :class:`Discriminator`."""
        return self.logits(
            [(self.context(c.example) + c.example.prompt_ids, c.completion_ids) for c in candidates]
        )

    def logits(self, sequences: Sequence[Tokens]) -> list[float]:
        """Return the logit of each (prompt ids, completion ids)."""
        self.module.eval()
        with torch.no_grad(), self.autocast():
            return batched_logits(
                sequences,
                lambda indices: self.module(*self._pad([sequences[index] for index in indices])),
                max_tokens=self.max_tokens,
                packed=self.packed,
            )

    def losses(
        self,
        comparisons: Sequence[Comparison],
        module: nn.Module | None = None,
        *,
        max_tokens: int | None = None,
    ) -> Iterator[Callable[[], dict[str, Tensor]]]:
        """Yield one function per batch, which computes the SUMS of its losses, by the keys of :meth:`counts`.

        Args:
            comparisons: Each with a demonstration unless the loss is unpaired. Without any, the only losses
                are differentiable zeros.
            module: The DDP or FSDP module to call instead of the discriminator's own.
            max_tokens: Replaces the discriminator's own limit.
        """
        module = module or self.module
        if self.unpaired:
            comparisons = [part for comparison in comparisons for part in comparison.apart()]
        for batch in _batches(comparisons, max_tokens or self.max_tokens):
            yield lambda batch=batch: self._loss(batch, module)
        if not comparisons:
            yield lambda: self._no_loss(module)

    def counts(self, comparisons: Sequence[Comparison]) -> dict[str, int]:
        """Terms of each loss."""
        negatives = sum(len(c.completions) for c in comparisons)
        if self.unpaired:
            return {"expert": sum(len(c.expert) for c in comparisons), "negative": negatives}
        return {"pairs": negatives}

    def _loss(self, comparisons: list[Comparison], module: nn.Module) -> dict[str, Tensor]:
        logits = module(*self._pad([s for c in comparisons for s in c.sequences]))
        parts = logits.split([size for c in comparisons for size in (len(c.expert), len(c.completions))])
        experts, negatives = parts[::2], parts[1::2]
        if self.unpaired:
            expert, negative = logistic_losses(torch.cat(experts), torch.cat(negatives))
            return {"expert": expert, "negative": negative}
        pairs = [e.expand(len(n)) for e, n in zip(experts, negatives, strict=True)]
        loss = bradley_terry_loss(
            torch.cat(pairs), torch.cat(negatives), label_smoothing=self.label_smoothing
        )
        return {"pairs": loss}

    def _no_loss(self, module: nn.Module) -> dict[str, Tensor]:
        zero = module(*self._pad([((self.pad_id,), (self.pad_id,))]))[:0].sum()
        return {"expert": zero, "negative": zero} if self.unpaired else {"pairs": zero}

    def _pad(self, sequences: Sequence[Tokens]) -> tuple[Tensor, Tensor, tuple[Span, ...]]:
        rows = [prompt + completion for prompt, completion in sequences]
        padded = pad_right(rows, self.pad_id, self.module.head.weight.device)
        return (*padded, spans_of(sequences) if self.packed else ())


def _batches(comparisons: Sequence[Comparison], max_tokens: int) -> list[list[Comparison]]:
    """Split comparisons, in order, into batches of at most `max_tokens` padded tokens, or of one negative."""
    batches: list[list[Comparison]] = []
    rows = width = 0
    for comparison in [part for one in comparisons for part in one.split(max_tokens)]:
        rows, width = rows + len(comparison.sequences), max(width, comparison.width)
        if not batches or rows * width > max_tokens:
            batches.append([])
            rows, width = len(comparison.sequences), comparison.width
        batches[-1].append(comparison)
    return batches


class Replay:
    """A buffer of the last `size` comparisons, so that training includes completions of older policies."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: list[Comparison] = []

    def add(self, comparisons: Sequence[Comparison]) -> None:
        """Append comparisons and drop the oldest beyond `size`."""
        self.items = (self.items + list(comparisons))[-self.size :] if self.size else []

    def draw(self, count: int, *, seed: int) -> list[Comparison]:
        """Return up to `count` different items in random order."""
        generator = torch.Generator().manual_seed(seed)
        order = items_of(torch.randperm(len(self.items), generator=generator))
        return [self.items[index] for index in order[:count]]

    def state(self) -> list[dict[str, Any]]:
        """Return the items as JSON values for a checkpoint."""
        return [asdict(item) for item in self.items]

    def load(self, state: list[dict[str, Any]]) -> None:
        """Restore :meth:`state` after a round trip through JSON."""
        self.items = [
            Comparison(
                prompt_ids=tuple(item["prompt_ids"]),
                demonstration_ids=item["demonstration_ids"] and tuple(item["demonstration_ids"]),
                completions=tuple(map(tuple, item["completions"])),
            )
            for item in state
        ]


@dataclass
class AdversaryState:
    """What the discriminator's training carries from step to step; a checkpoint contains all of it."""

    accuracy: float = 0.5
    """Moving average of the accuracy on new pairs, measured before the update that uses them."""
    accurate: bool = False
    """The accuracy reached `min_accuracy`, and has not fallen clearly below it since."""
    paused: bool = False
    """Training is paused because the accuracy rose above the band."""
    expert_mean: float | None = None
    """Moving average of the demonstrations' logits, used for prompts without a demonstration."""
    max_tokens: int | None = None
    """Tokens per batch after one ran out of memory; None uses the configured number."""

    def observe(
        self, *, accuracy: float | None, expert_logit: float | None, band: tuple[float, float]
    ) -> None:
        """Update the averages with a step's new pairs; pause above the band, resume below it."""
        if accuracy is not None:
            self.accuracy += (1 - ACCURACY_DECAY) * (accuracy - self.accuracy)
        if expert_logit is not None:
            before = expert_logit if self.expert_mean is None else self.expert_mean
            self.expert_mean = before + (1 - ACCURACY_DECAY) * (expert_logit - before)
        if self.accuracy > band[1]:
            self.paused = True
        elif self.accuracy < band[0]:
            self.paused = False

    def compare_accuracy(self, minimum: float) -> None:
        """Set `accurate` at the minimum, and clear it only ACCURACY_MARGIN below; a minimum of 0 is always
        reached."""
        if self.accuracy >= minimum:
            self.accurate = True
        elif self.accuracy <= minimum - ACCURACY_MARGIN:
            self.accurate = False
