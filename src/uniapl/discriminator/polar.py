"""POLAR, a frozen discriminator: was the candidate written by the same policy as the reference?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from uniapl.data.batching import batch_by_length, pad_right
from uniapl.discriminator import Candidate
from uniapl.errors import UniAPLError, UsageError
from uniapl.models.loading import from_pretrained, load_weights
from uniapl.types import Prompt
from uniapl.untyped import items_of

SEPARATOR, END = "<|reward|>", "[UNUSED_TOKEN_130]"
"""The token between the two trajectories, and the last token, at which the score is read."""
MAX_LENGTH = 16384


@dataclass(frozen=True, kw_only=True)
class PolarFormat:
    """The input text of a POLAR model.

        prompt \\n reference <|reward|> prompt \\n candidate [UNUSED_TOKEN_130]

    Source: POLAR (arXiv 2507.05197) and its client, which truncates in the same order: first the completions
    to their last `max_response_length` tokens, then the prompt, so that the text fits `max_length`.
    """

    tokenizer: Any
    max_length: int = MAX_LENGTH
    max_response_length: int = MAX_LENGTH // 4

    @staticmethod
    def load(name: str, *, trust_remote_code: bool) -> "PolarFormat":
        """Load the tokenizer and the maximum length of a POLAR model in a directory or on the Hub.

        A directory with only a tokenizer, for a model on a server, gets POLAR's own maximum length.

        Raises:
            UsageError: They cannot be loaded, or the tokenizer lacks POLAR's two tokens.
        """
        trusted = {"trust_remote_code": trust_remote_code}
        tokenizer: Any = from_pretrained(AutoTokenizer, "tokenizer", name, **trusted)
        for token in (SEPARATOR, END):
            ids = tokenizer.encode(token, add_special_tokens=False)
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise UsageError(f"the tokenizer of '{name}' has no token '{token}': it is not a POLAR model")
        if Path(name).is_dir() and not (Path(name) / "config.json").exists():
            return PolarFormat(tokenizer=tokenizer)
        config = from_pretrained(AutoConfig, "discriminator", name, **trusted)
        return PolarFormat.within(tokenizer, config)

    @staticmethod
    def within(tokenizer: Any, config: Any) -> "PolarFormat":
        """Fit the model's maximum length; a completion takes up to a quarter of it, as in POLAR's client."""
        window = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
        # The text does not contain the special tokens that the tokenizer adds.
        length = int(min(MAX_LENGTH, window - tokenizer.num_special_tokens_to_add()))
        return PolarFormat(tokenizer=tokenizer, max_length=length, max_response_length=length // 4)

    def text(self, prompt: Prompt, reference: str, candidate: str) -> str:
        """Return the truncated text; the messages of a prompt are joined by line breaks."""
        if not isinstance(prompt, str):
            prompt = "\n".join(str(message["content"]) for message in prompt)
        prompt_ids, *completions = (self.tokenizer.encode(part) for part in (prompt, reference, candidate))
        completions = [ids[-self.max_response_length :] for ids in completions]
        # The end token, the separator and two line breaks take four tokens.
        room = max(0, (self.max_length - 4 - sum(map(len, completions))) // 2)
        kept = (prompt_ids[max(0, len(prompt_ids) - room) :], *completions)
        prompt, first, second = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in kept)
        return f"{prompt}\n{first}{SEPARATOR}{prompt}\n{second}{END}"


@dataclass(frozen=True, kw_only=True)
class Polar:
    """A POLAR model in this process."""

    needs_reference: ClassVar[bool] = True
    model: Any
    format: PolarFormat
    max_tokens: int
    """Padded tokens per batch; a batch has at least one row."""

    @staticmethod
    def load(name: str, *, trust_remote_code: bool, max_tokens: int, device: torch.device) -> "Polar":
        """Load a reward model with its own code, or a sequence classifier, from a directory or the Hub.

        Raises:
            UsageError: It cannot be loaded, or has no pad token.
        """
        format = PolarFormat.load(name, trust_remote_code=trust_remote_code)
        tokenizer = format.tokenizer
        model = Polar.load_classifier(name, trust_remote_code=trust_remote_code)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id in (None, tokenizer.convert_tokens_to_ids(END)):
            raise UsageError(f"the tokenizer of '{name}' needs a pad token that is not '{END}'")
        model.config.pad_token_id = tokenizer.pad_token_id
        model.eval().requires_grad_(False).to(device)
        return Polar(model=model, format=format, max_tokens=max_tokens)

    @staticmethod
    def load_classifier(name: str, *, trust_remote_code: bool, headers_only: bool = False) -> Any:
        """Load only the model. With `headers_only`, check it; see :func:`uniapl.models.loading.load_weights`.

        Raises:
            UsageError: It cannot be loaded, or does not have exactly one output.
        """
        trusted = {"trust_remote_code": trust_remote_code}
        config = from_pretrained(AutoConfig, "discriminator", name, **trusted)
        # Without a class of its own, AutoModel would load a trunk without a head.
        own = "AutoModel" in (getattr(config, "auto_map", None) or {})
        classifier = (config.architectures or [""])[0].endswith("ForSequenceClassification") or not own
        family: Any = AutoModelForSequenceClassification if classifier else AutoModel
        model = load_weights(family, "discriminator", name, headers_only=headers_only, **trusted)
        if classifier and model.config.num_labels != 1:
            raise UsageError(
                f"the discriminator '{name}' has {model.config.num_labels} outputs; a POLAR model has one"
            )
        return model

    @torch.no_grad()
    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        """Return the logit of each candidate; the reference is the demonstration of its prompt."""
        texts = [self.format.text(c.example.prompt, reference_of(c), c.text) for c in candidates]
        return items_of(self.logits(texts))

    def logits(self, texts: Sequence[str]) -> Tensor:
        """Return the logits [N] of texts in POLAR's format, with gradients if the weights require them."""
        rows: list[list[int]] = [self.format.tokenizer.encode(text) for text in texts]
        device = next(self.model.parameters()).device
        logits = torch.zeros(len(rows), device=device)
        for indices in batch_by_length([len(row) for row in rows], max_tokens=self.max_tokens):
            batch = [rows[index] for index in indices]
            ids, mask = pad_right(batch, self.format.tokenizer.pad_token_id, device)
            scores = self.model(input_ids=ids, attention_mask=mask)[0].reshape(len(batch)).float()
            logits = logits.index_copy(0, torch.tensor(indices, device=device), scores)
        return logits


def reference_of(candidate: Candidate) -> str:
    """Return the demonstration of the candidate's prompt; raise a UniAPLError if there is none."""
    if candidate.reference is None:
        raise UniAPLError(
            f"row {candidate.example.row} has no demonstration, which this discriminator needs as a reference"
        )
    return candidate.reference
