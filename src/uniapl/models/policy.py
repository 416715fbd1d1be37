"""The policy as the loss sees it: token ids and masks in, log-probabilities out."""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from uniapl.functional import logprobs_from_logits, selected_logprobs
from uniapl.models.packing import Packing, can_pack, packed_hidden
from uniapl.types import MicroBatch, Span


def inputs_of(batch: MicroBatch, mask: Tensor) -> tuple[Any, ...]:
    """What a policy's forward takes to give the log-probabilities of a batch's tokens under `mask`."""
    return batch.input_ids, batch.attention_mask, batch.position_ids, mask, batch.temperature, batch.spans


class Policy(nn.Module):
    """A causal language model whose forward gives the log-probabilities of chosen tokens.

    Only the positions under the mask meet the language-model head, in chunks. Where the model does more than
    a linear head (a soft cap, a logit scale), which a check at the start finds out, full logits are used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        autocast: Callable[..., contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """Wrap a model; `autocast` is the precision context that it will run in."""
        super().__init__()
        # Always eval: dropout in the ratio's two log-probabilities would make the ratio noise.
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
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of the tokens under `mask`, 0 elsewhere.

        Args:
            input_ids, attention_mask, position_ids: [B, T], as in MicroBatch.
            mask: [B, T]; never True in the first column, which no token precedes.
            temperature: [B], one per row.
            spans: Of each row, so that the model reads them packed; it reads them padded where it cannot, or
                where there are none.

        Returns:
            `logprobs` and `entropy`, [B, T], nats, aligned to the token they speak of.
        """
        chosen = mask[:, 1:]
        token_ids = input_ids[:, 1:][chosen]
        temperatures = temperature.unsqueeze(-1).expand_as(chosen)[chosen]
        inputs = self._inputs(input_ids, attention_mask, position_ids)
        if self.has_linear_head:
            if spans and self.packs:
                packing = Packing(spans, input_ids.shape[1], input_ids.device)
                hidden = packed_hidden(self.model.base_model, input_ids, position_ids, packing)
                hidden = hidden[packing.slots[:, :-1][chosen]]
            else:
                hidden = self.model.base_model(**inputs).last_hidden_state[:, :-1][chosen]
            device = hidden.device.type
            if torch.is_autocast_enabled(device):
                hidden = hidden.to(torch.get_autocast_dtype(device))
            head: Any = self.model.get_output_embeddings()
            with torch.autocast(device, enabled=False):
                logprobs, entropy = selected_logprobs(
                    hidden, head.weight, token_ids, temperatures, bias=getattr(head, "bias", None)
                )
        else:
            logits = self.model(**inputs).logits[:, :-1][chosen].float()
            logprobs, entropy = logprobs_from_logits(logits, token_ids, temperatures)
        empty = torch.zeros(mask.shape, dtype=logprobs.dtype, device=mask.device)
        return empty.masked_scatter(mask, logprobs), empty.masked_scatter(mask, entropy)

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> dict[str, Any]:
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask.long(),
            "use_cache": False,
            **positions,
        }

    @torch.no_grad()
    def _check_head(self) -> bool:
        """Whether trunk and head alone reproduce the model's own logits, now and after training."""
        head, trunk = self.model.get_output_embeddings(), self.model.base_model
        # A soft cap is hardly felt by the small logits of a fresh model, and very much later on.
        capped = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        if not isinstance(head, nn.Linear) or trunk is self.model or capped:
            return False
        ids = torch.arange(4, device=self.model.device).unsqueeze(0) % head.weight.shape[0]
        inputs = self._inputs(ids, torch.ones_like(ids), torch.arange(4, device=ids.device).unsqueeze(0))
        logits = self.model(**inputs).logits
        difference = (head(trunk(**inputs).last_hidden_state) - logits).abs().max()
        tolerance = 1e-2 if torch.is_autocast_enabled(logits.device.type) else 1e-5
        return bool(difference <= tolerance * logits.abs().max())
