"""The policy as the loss uses it: token ids and masks in, log-probabilities out."""

import contextlib
import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from uniapl.errors import UsageError
from uniapl.functional import logprobs_from_logits, selected_logprobs, top_logprobs
from uniapl.models.packing import Packing, can_pack, packed_hidden
from uniapl.types import MicroBatch, Span
from uniapl.untyped import is_sequence


def inputs_of(batch: MicroBatch, mask: Tensor) -> tuple[Any, ...]:
    """The arguments of `Policy.forward` for the tokens of a micro-batch under `mask`."""
    return batch.input_ids, batch.attention_mask, batch.position_ids, mask, batch.temperature, batch.spans


@contextlib.contextmanager
def layer_outputs(trunk: nn.Module, layers: Sequence[int]) -> Generator[list[Tensor]]:
    """Yield a list that receives the outputs of decoder layers, numbered from 1, in the forward pass."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if is_sequence(output) else output)

    handles = [decoder_layers(trunk)[layer - 1].register_forward_hook(keep) for layer in sorted(layers)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(trunk: nn.Module) -> nn.ModuleList:
    """The decoder layers of a trunk.

    Raises:
        UsageError: The trunk has no list of as many layers as its configuration says.
    """
    config: Any = trunk.config
    count = config.get_text_config().num_hidden_layers
    for module in trunk.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UsageError(
        f"{type(trunk).__name__} has no list of {count} decoder layers for the discriminator to read; choose "
        "another discriminator.kind"
    )


def keep_first_layers(trunk: nn.Module, count: int) -> None:
    """Remove the decoder layers of a trunk after the first `count`; the last norm stays.

    Raises:
        UsageError: It has fewer layers.
    """
    layers = decoder_layers(trunk)
    if count > len(layers):
        raise UsageError(f"discriminator.num_layers {count}: the model has {len(layers)} decoder layers")
    del layers[count:]
    model: Any = trunk
    config = model.config.get_text_config()
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What a forward pass of the policy computes in addition."""

    layers: Sequence[int] = ()
    """Decoder layers, from 1, whose hidden states are returned as well."""
    entropy_gradient: bool = False
    """Whether the entropy carries a gradient."""
    candidates: Tensor | None = None
    """[B, T, K]: tokens whose log-probabilities at each position are returned as well."""


class Policy(nn.Module):
    """A causal language model whose forward returns the log-probabilities of selected tokens.

    Only the selected positions pass through the language-model head, in chunks. A probe finds out whether the
    model's logits are those of a linear head; if not (soft cap, logit scale), the full logits are computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        autocast: Callable[..., contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """`autocast` is the precision context in which the model will run."""
        super().__init__()
        # Always in eval mode: dropout would make the ratio of two log-probabilities random.
        self.model = model.eval()
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        with autocast():
            self.has_linear_head = self._check_head()
            self.packs = self.has_linear_head and can_pack(model.base_model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        temperature: Tensor,
        spans: Sequence[Span] = (),
        extras: Extras = Extras(),
    ) -> tuple[Tensor, ...]:
        """Log-probability and entropy of the tokens under `mask`, 0 elsewhere.

        Args:
            input_ids: [B, T], as in MicroBatch.
            attention_mask: [B, T].
            position_ids: [B, T].
            mask: [B, T]; False in the first column, which has no previous token.
            temperature: [B], one per row.
            spans: One per row, to compute packed rows if the model can; empty for padded rows.

        Returns:
            `logprobs` and `entropy`, [B, T], in nats, aligned with the token they refer to; with
            `extras.candidates` also their log-probabilities [B, T, K]; with `extras.layers` also the hidden
            states [N, layers * D] of the N tokens under `mask`, row by row, at their own positions, in fp32.
        """
        selected = mask[:, 1:]
        inputs = self._inputs(input_ids, attention_mask, position_ids)
        packing = self._packing(input_ids, spans)
        with layer_outputs(self.model.base_model, extras.layers) as outputs:
            hidden = self._hidden(inputs, selected, packing)
        token_ids = input_ids[:, 1:][selected].unsqueeze(-1)
        if extras.candidates is not None:
            token_ids = torch.cat([token_ids, extras.candidates[:, 1:][selected]], dim=-1)
        temperatures = temperature.unsqueeze(-1).expand_as(selected)[selected]
        gradient = {"entropy_gradient": extras.entropy_gradient}
        if self.has_linear_head:
            with torch.autocast(hidden.device.type, enabled=False):
                head, bias = self._head()
                logprobs, entropy = selected_logprobs(
                    hidden, head, token_ids, temperatures, bias=bias, **gradient
                )
        else:
            logprobs, entropy = logprobs_from_logits(hidden, token_ids, temperatures, **gradient)
        results = _spread(logprobs[:, 0], mask), _spread(entropy, mask)
        if extras.candidates is not None:
            results += (_spread(logprobs[:, 1:], mask),)
        if not extras.layers:
            return results

        def own(states: Tensor) -> Tensor:
            return states[0][packing.slots[:, 1:][selected]] if packing else states[:, 1:][selected]

        return *results, torch.cat([own(output).float() for output in outputs], dim=-1)

    @torch.no_grad()
    def most_likely(self, batch: MicroBatch, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The `k` most likely tokens at each position under `mask`.

        Returns:
            Ids and log-probabilities (nats) [B, T, k], 0 elsewhere.
        """
        selected = mask[:, 1:]
        inputs = self._inputs(batch.input_ids, batch.attention_mask, batch.position_ids)
        hidden = self._hidden(inputs, selected, self._packing(batch.input_ids, batch.spans))
        temperatures = batch.temperature.unsqueeze(-1).expand_as(selected)[selected]
        if self.has_linear_head:
            with torch.autocast(hidden.device.type, enabled=False):
                head, bias = self._head()
                ids, logprobs = top_logprobs(hidden, head, temperatures, k=k, bias=bias)
        else:
            logprobs, ids = (hidden / temperatures.unsqueeze(-1)).log_softmax(-1).topk(k)
        return _spread(ids, mask), _spread(logprobs, mask)

    def _packing(self, input_ids: Tensor, spans: Sequence[Span]) -> Packing | None:
        return Packing(spans, input_ids.shape[1], input_ids.device) if spans and self.packs else None

    def _hidden(self, inputs: dict[str, Any], selected: Tensor, packing: Packing | None) -> Tensor:
        """[N, D]: the last hidden states that predict the selected tokens; [N, V], their logits in fp32,
        without a linear head."""
        trunk: Any = self.model.base_model
        if packing:
            hidden = packed_hidden(trunk, inputs["input_ids"], inputs["position_ids"], packing)
            hidden = hidden[packing.slots[:, :-1][selected]]
        elif self.has_linear_head:
            hidden = trunk(**inputs).last_hidden_state[:, :-1][selected]
        else:
            return self.model(**inputs).logits[:, :-1][selected].float()
        device = hidden.device.type
        return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the language-model head."""
        head = cast("Any", self.model).get_output_embeddings()
        return head.weight, getattr(head, "bias", None)

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
        return inputs | ({"position_ids": position_ids} if self.takes_positions else {})

    @torch.no_grad()
    def _check_head(self) -> bool:
        """Whether the logits are the linear head applied to the last hidden states."""
        model = cast("Any", self.model)
        head, trunk = model.get_output_embeddings(), model.base_model
        # A soft cap hardly changes the small logits of a new model, but those of a trained one.
        capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        if not isinstance(head, nn.Linear) or trunk is self.model or capped:
            return False
        positions = torch.arange(4, device=self.model.device).unsqueeze(0)
        ids = positions % head.weight.shape[0]
        inputs = self._inputs(ids, torch.ones_like(ids), positions)
        logits = self.model(**inputs).logits
        difference = (head(trunk(**inputs).last_hidden_state) - logits).abs().max()
        tolerance = 1e-2 if torch.is_autocast_enabled(logits.device.type) else 1e-5
        return bool(difference <= tolerance * logits.abs().max())


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] or [B, T, K] with the values [N] or [N, K] of the tokens under `mask`, and 0 elsewhere."""
    zeros = torch.zeros(*mask.shape, *values.shape[1:], dtype=values.dtype, device=mask.device)
    return zeros.masked_scatter(mask if values.ndim == 1 else mask.unsqueeze(-1), values)
