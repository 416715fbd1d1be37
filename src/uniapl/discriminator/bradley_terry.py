"""The co-trained discriminator: a language model's trunk with a scalar head, and what steers its training."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from uniapl.data.batching import by_length, by_prompt, pad_right, spans_of
from uniapl.discriminator import Candidate
from uniapl.discriminator.lora import LoraTrunk
from uniapl.errors import UsageError
from uniapl.functional import bradley_terry_loss
from uniapl.models.lora import merge_in_place
from uniapl.models.packing import Packing, packed_hidden
from uniapl.types import Example, RolloutGroup, Span, TokenIds, derive_seed

Scored = tuple[TokenIds, TokenIds]
"""Prompt ids and completion ids of what is given a logit."""

Context = Callable[[Example], TokenIds]
"""What is read before an example's prompt."""


def no_context(example: Example) -> TokenIds:
    """Nothing: the prompt comes first."""
    return ()


def another_example(examples: Sequence[Example], seed: int) -> Context:
    """Another prompt with its demonstration, always the same one for a prompt: what the expert is like.

    Not the prompt's own answer: the expert's would then be known by being read twice. Source:
    our choice, for a discriminator that has one answer of the expert per prompt.

    Raises:
        UsageError: Fewer than two prompts have a demonstration.
    """
    shown = {e.prompt_ids: e.demonstration_ids for e in examples if e.demonstration_ids is not None}
    if len(shown) < 2:
        raise UsageError(
            "discriminator.in_context_demonstration needs demonstrations of at least two different prompts"
        )
    prompts = list(shown)

    def context(example: Example) -> TokenIds:
        drawn = derive_seed(seed, "context", *example.prompt_ids)
        chosen = prompts[drawn % len(prompts)]
        # The same answer to another prompt would give the expert's away just as well.
        for offset in range(len(prompts)):
            chosen = prompts[(drawn + offset) % len(prompts)]
            if chosen != example.prompt_ids and shown[chosen] != example.demonstration_ids:
                return chosen + (shown[chosen] or ())
        return ()

    return context


ACCURACY_DECAY = 0.9
"""Of the moving average that the accuracy band looks at: about the last ten steps. Our choice."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The expert's answer to a prompt beside the policy's: one Bradley-Terry pair per completion."""

    prompt_ids: TokenIds
    demonstration_ids: TokenIds
    completions: tuple[TokenIds, ...]

    @staticmethod
    def of(group: RolloutGroup, context: Context) -> "Comparison":
        """The comparison that a group with a demonstration allows; a rejected answer loses too."""
        example = group.example
        assert example.demonstration_ids is not None
        rejected = () if example.rejected_ids is None else (example.rejected_ids,)
        return Comparison(
            prompt_ids=context(example) + example.prompt_ids,
            demonstration_ids=example.demonstration_ids,
            completions=(*(rollout.completion_ids for rollout in group.rollouts), *rejected),
        )

    @property
    def sequences(self) -> list[Scored]:
        """The demonstration first, then the completions."""
        return [(self.prompt_ids, ids) for ids in (self.demonstration_ids, *self.completions)]

    @property
    def width(self) -> int:
        """Tokens of its longest sequence."""
        return len(self.prompt_ids) + max(map(len, (self.demonstration_ids, *self.completions)))

    def within(self, limit: int) -> list["Comparison"]:
        """The same pairs in comparisons of at most `limit` padded tokens, or of one pair."""
        size = max(1, limit // self.width - 1)
        return [
            replace(self, completions=self.completions[start : start + size])
            for start in range(0, max(1, len(self.completions)), size)
        ]


class BradleyTerry(nn.Module):
    """A trunk that reads prompt and answer, and a linear head on the hidden state of the last token.

    Source: GAD (arXiv 2511.10643), where a copy of the student did best. The head starts at zero, so that
    every answer begins with win probability 0.5; it has no bias, since only differences count.
    """

    def __init__(self, trunk: PreTrainedModel | LoraTrunk) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        self.takes_positions = "position_ids" in inspect.signature(trunk.forward).parameters

    @staticmethod
    def copy_of(model: PreTrainedModel) -> "BradleyTerry":
        """A discriminator whose trunk is a copy of a language model's."""
        if model.base_model is model:
            raise UsageError(
                f"{type(model).__name__} has no trunk apart from its head to copy; name another backbone in "
                "discriminator.model_name_or_path"
            )
        trunk: Any = copy.deepcopy(model.base_model)
        merge_in_place(trunk)
        return BradleyTerry(trunk).to(model.device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, spans: Sequence[Span] = ()) -> Tensor:
        """Logits [B] of right-padded rows, read packed if their spans are given.

        The last token is found by length, never by token id.
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
        # In fp32 also under autocast: bf16 would round logits whose small differences are the credit.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float()).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class BradleyTerryDiscriminator:
    """Scoring and the training loss on top of a :class:`BradleyTerry` module."""

    needs_reference: ClassVar[bool] = False
    module: BradleyTerry
    pad_id: int
    max_tokens: int
    """Of one batch at most, a shared prompt once or with padding: one row at least when scoring, one pair
    in the loss."""
    label_smoothing: float = 0.0
    context: Context = no_context
    packed: bool = False
    """Rows are read packed; :func:`uniapl.models.packing.can_pack` has said that its trunk can."""
    autocast: Callable[..., contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        """The logit of each candidate. See :class:`Discriminator`."""
        return self.logits(
            [(self.context(c.example) + c.example.prompt_ids, c.completion_ids) for c in candidates]
        )

    def logits(self, sequences: Sequence[Scored]) -> list[float]:
        """The logit of each (prompt ids, completion ids)."""
        self.module.eval()
        logits = [0.0] * len(sequences)
        if self.packed:
            parts = by_prompt(sequences, max_tokens=self.max_tokens)
        else:
            lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
            parts = by_length(lengths, max_tokens=self.max_tokens)
        with torch.no_grad(), self.autocast():
            for part in parts:
                batch = self._pad([sequences[i] for i in part])
                for index, logit in zip(part, self.module(*batch).tolist(), strict=True):
                    logits[index] = logit
        return logits

    def losses(
        self,
        comparisons: Sequence[Comparison],
        module: nn.Module | None = None,
        *,
        max_tokens: int | None = None,
    ) -> Iterator[Callable[[], Tensor]]:
        """One loss per batch of comparisons, each computed when called: a SUM over the batch's pairs.

        Args:
            comparisons: Cut into batches by `max_tokens`; none gives one loss that is a differentiable zero.
            module: The module to run, where it is wrapped for several processes.
            max_tokens: Instead of the discriminator's own.
        """
        run = module or self.module
        if not comparisons:
            nothing = Comparison(prompt_ids=(self.pad_id,), demonstration_ids=(self.pad_id,), completions=())
            comparisons = [nothing]
        for part in _cut(comparisons, max_tokens or self.max_tokens):
            yield lambda part=part: self._loss(part, run)

    def _loss(self, comparisons: list[Comparison], module: nn.Module) -> Tensor:
        logits = module(*self._pad([s for c in comparisons for s in c.sequences]))
        sizes = [1 + len(c.completions) for c in comparisons]
        groups = logits.split(sizes)
        expert = torch.cat([group[:1].expand(len(group) - 1) for group in groups])
        policy = torch.cat([group[1:] for group in groups])
        return bradley_terry_loss(expert, policy, label_smoothing=self.label_smoothing)

    def _pad(self, sequences: Sequence[Scored]) -> tuple[Tensor, Tensor, tuple[Span, ...]]:
        rows = [prompt + completion for prompt, completion in sequences]
        return (
            *pad_right(rows, self.pad_id, self.module.head.weight.device),
            spans_of(sequences) if self.packed else (),
        )


def _cut(comparisons: Sequence[Comparison], limit: int) -> list[list[Comparison]]:
    """Consecutive parts, each of which takes at most `limit` padded tokens, or is one pair."""
    parts: list[list[Comparison]] = []
    rows = width = 0
    for comparison in [piece for whole in comparisons for piece in whole.within(limit)]:
        rows, width = rows + len(comparison.sequences), max(width, comparison.width)
        if not parts or rows * width > limit:
            parts.append([])
            rows, width = len(comparison.sequences), comparison.width
        parts[-1].append(comparison)
    return parts


class Replay:
    """Older comparisons, oldest out first; the discriminator keeps seeing what the policy used to write."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: list[Comparison] = []

    def add(self, comparisons: Sequence[Comparison]) -> None:
        """Append, dropping the oldest beyond `size`."""
        self.items = (self.items + list(comparisons))[-self.size :] if self.size else []

    def draw(self, count: int, *, seed: int) -> list[Comparison]:
        """`count` of the items without repetition (all of them, if there are fewer)."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.items), generator=generator).tolist()
        return [self.items[index] for index in order[:count]]

    def state(self) -> list[dict[str, Any]]:
        """As plain lists, for a checkpoint."""
        return [asdict(item) for item in self.items]

    def load(self, state: list[dict[str, Any]]) -> None:
        """The inverse of :meth:`state`, after JSON."""
        self.items = [
            Comparison(
                prompt_ids=tuple(item["prompt_ids"]),
                demonstration_ids=tuple(item["demonstration_ids"]),
                completions=tuple(map(tuple, item["completions"])),
            )
            for item in state
        ]


@dataclass
class AdversaryState:
    """What the discriminator's cadence remembers from step to step; all of it is in a checkpoint."""

    accuracy: float = 0.5
    """Moving average of the accuracy on fresh pairs, taken before the discriminator has learnt from them."""
    paused: bool = False
    expert_mean: float | None = None
    """Moving average of the expert's logits: stands in where a prompt has no demonstration."""
    max_tokens: int | None = None
    """Of a batch, since one has not fitted in memory; None: the configuration's."""

    def observe(
        self, *, accuracy: float | None, expert_logit: float | None, band: tuple[float, float]
    ) -> None:
        """Take in a step's fresh pairs; pause above the band, go on below it."""
        if accuracy is not None:
            self.accuracy += (1 - ACCURACY_DECAY) * (accuracy - self.accuracy)
        if expert_logit is not None:
            before = expert_logit if self.expert_mean is None else self.expert_mean
            self.expert_mean = before + (1 - ACCURACY_DECAY) * (expert_logit - before)
        if self.accuracy > band[1]:
            self.paused = True
        elif self.accuracy < band[0]:
            self.paused = False
