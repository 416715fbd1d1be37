"""A small head on a model's hidden states as a discriminator.

The reference's forward pass gives the states and the log-probabilities of the tokens, so that the head costs
little in addition: a projection, attention pooling and a small network.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from uniapl.models.token_states import TokenStates

WIDTH = 128
"""Features per token, and units of the last network. Our choice."""
QUERIES = 4
"""Weighted means over the tokens of a completion. Our choice."""


class StateHead(nn.Module):
    """d(x, y) from the states and log-probabilities of the tokens of y.

    Each token has its normalized state and, by default, its log-probability, which shows what the reference
    finds implausible for this prompt. Source: our choice (docs/log.md).
    """

    def __init__(self, size: int, *, log_probability_features: bool = True) -> None:
        """Create a head that is undecided.

        Args:
            size: Number of features of a token's states.
            log_probability_features: Whether a token's log-probability is one of its features.
        """
        super().__init__()
        self.log_probability_features = log_probability_features
        self.norm = nn.LayerNorm(size)
        self.project = nn.Linear(size + log_probability_features, WIDTH)
        # A bias would cancel in the softmax over tokens.
        self.query = nn.Linear(WIDTH, QUERIES, bias=False)
        self.hidden = nn.Linear(QUERIES * WIDTH, WIDTH)
        # Starts at 0, so that every win probability is 0.5 at first.
        self.out = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, states: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
        """Return the logits [B] of completions padded to T tokens.

        Args:
            states: [B, T, size].
            logprobs: [B, T], in nats.
            mask: [B, T], False for padding; a completion without tokens has the logit of zero features.
        """
        features = self.norm(states)
        if self.log_probability_features:
            features = torch.cat([features, logprobs.unsqueeze(-1)], dim=-1)
        features = F.gelu(self.project(features))
        scores = self.query(features).masked_fill(~mask.unsqueeze(-1), torch.finfo(features.dtype).min)
        weights = torch.where(mask.unsqueeze(-1), scores.softmax(dim=1), 0.0)
        pooled = torch.einsum("btq,btw->bqw", weights, features).flatten(1)
        return self.out(F.gelu(self.hidden(pooled))).squeeze(-1)


def head_logits(module: nn.Module, completions: Sequence[TokenStates]) -> Tensor:
    """Pad the completions and call a (wrapped) :class:`StateHead`; at least one completion."""
    mask = pad_sequence(
        [torch.ones_like(c.logprobs, dtype=torch.bool) for c in completions], batch_first=True
    )
    states = pad_sequence([c.states for c in completions], batch_first=True)
    logprobs = pad_sequence([c.logprobs for c in completions], batch_first=True)
    with torch.autocast(states.device.type, enabled=False):
        return module(states.float(), logprobs.float(), mask)
