"""The policy as the loss uses it: token ids and masks in, log-probabilities out."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from uniapl.errors import UsageError
from uniapl.functional import logprobs_from_logits, selected_logprobs
from uniapl.models.packing import Packing, can_pack, packed_hidden
from uniapl.types import MicroBatch, Span


def inputs_of(batch: MicroBatch, mask: Tensor) -> tuple[Any, ...]:
    """The arguments of `Policy.forward` for the tokens of a micro-batch under `mask`."""
    return batch.input_ids, batch.attention_mask, batch.position_ids, mask, batch.temperature, batch.spans


@contextlib.contextmanager
def layer_outputs(trunk: nn.Module, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """Yield a list that receives the outputs of decoder layers, numbered from 1, in the forward pass."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

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
        layers: Sequence[int] = (),
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, ...]:
        """Log-probability and entropy of the tokens under `mask`, 0 elsewhere.

        Args:
            input_ids, attention_mask, position_ids: [B, T], as in MicroBatch.
            mask: [B, T]; False in the first column, which has no previous token.
            temperature: [B], one per row.
            spans: One per row, to compute packed rows if the model can; empty for padded rows.
            layers: Decoder layers, from 1, whose hidden states are returned as well.
            entropy_gradient: Whether the entropy carries a gradient.

        Returns:
            `logprobs` and `entropy`, [B, T], in nats, aligned with the token they refer to; with `layers`
            also the hidden states [N, layers * D] of the N tokens under `mask`, row by row, at their own
            positions, in fp32.
        """
        selected = mask[:, 1:]
        token_ids = input_ids[:, 1:][selected]
        temperatures = temperature.unsqueeze(-1).expand_as(selected)[selected]
        inputs = self._inputs(input_ids, attention_mask, position_ids)
        packing = Packing(spans, input_ids.shape[1], input_ids.device) if spans and self.packs else None
        hidden = logits = input_ids.new_empty(0)
        with layer_outputs(self.model.base_model, layers) as outputs:
            if packing:
                hidden = packed_hidden(self.model.base_model, input_ids, position_ids, packing)
                hidden = hidden[packing.slots[:, :-1][selected]]
            elif self.has_linear_head:
                hidden = self.model.base_model(**inputs).last_hidden_state[:, :-1][selected]
            else:
                logits = self.model(**inputs).logits[:, :-1][selected].float()
        if not self.has_linear_head:
            logprobs, entropy = logprobs_from_logits(
                logits, token_ids, temperatures, entropy_gradient=entropy_gradient
            )
        else:
            device = hidden.device.type
            if torch.is_autocast_enabled(device):
                hidden = hidden.to(torch.get_autocast_dtype(device))
            head: Any = self.model.get_output_embeddings()
            bias = getattr(head, "bias", None)
            with torch.autocast(device, enabled=False):
                logprobs, entropy = selected_logprobs(
                    hidden, head.weight, token_ids, temperatures, bias=bias, entropy_gradient=entropy_gradient
                )
        zeros = torch.zeros(mask.shape, dtype=logprobs.dtype, device=mask.device)
        results = zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)
        if not layers:
            return results
        own = (lambda x: x[0][packing.slots[:, 1:][selected]]) if packing else (lambda x: x[:, 1:][selected])
        return *results, torch.cat([own(output).float() for output in outputs], dim=-1)

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
        return inputs | ({"position_ids": position_ids} if self.takes_positions else {})

    @torch.no_grad()
    def _check_head(self) -> bool:
        """Whether the logits are the linear head applied to the last hidden states."""
        head, trunk = self.model.get_output_embeddings(), self.model.base_model
        # A soft cap hardly changes the small logits of a new model, but those of a trained one.
        capped = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        if not isinstance(head, nn.Linear) or trunk is self.model or capped:
            return False
        positions = torch.arange(4, device=self.model.device).unsqueeze(0)
        ids = positions % head.weight.shape[0]
        inputs = self._inputs(ids, torch.ones_like(ids), positions)
        logits = self.model(**inputs).logits
        difference = (head(trunk(**inputs).last_hidden_state) - logits).abs().max()
        tolerance = 1e-2 if torch.is_autocast_enabled(logits.device.type) else 1e-5
        return bool(difference <= tolerance * logits.abs().max())
