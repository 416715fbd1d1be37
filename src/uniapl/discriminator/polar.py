"""A frozen discriminator in POLAR's format: is the candidate by the same policy as the reference?"""

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
from uniapl.models.loading import from_pretrained
from uniapl.types import Prompt

SEPARATOR, END = "<|reward|>", "[UNUSED_TOKEN_130]"
"""Between the two trajectories, and after the second: the score is read at the end token."""
MAX_LENGTH = 16384


@dataclass(frozen=True, kw_only=True)
class PolarFormat:
    """The text that a POLAR model reads.

        prompt \\n reference <|reward|> prompt \\n candidate [UNUSED_TOKEN_130]

    Source: POLAR (arXiv 2507.05197) and its client, whose order of truncation this follows: answers keep
    their last `max_response_length` tokens, then the prompt its last ones, so that all fits `max_length`.
    """

    tokenizer: Any
    max_length: int = MAX_LENGTH
    max_response_length: int = MAX_LENGTH // 4

    @staticmethod
    def load(name: str, *, trust_remote_code: bool) -> "PolarFormat":
        """For a POLAR model in a directory or on the Hub, with its tokenizer and its window (POLAR's, if a
        directory holds a tokenizer alone, as for a server that runs elsewhere).

        Raises:
            UsageError: It cannot be loaded, or does not know POLAR's two tokens.
        """
        trusted = {"trust_remote_code": trust_remote_code}
        tokenizer: Any = from_pretrained(AutoTokenizer.from_pretrained, "tokenizer", name, **trusted)
        for token in (SEPARATOR, END):
            ids = tokenizer.encode(token, add_special_tokens=False)
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise UsageError(
                    f"the tokenizer of '{name}' does not know '{token}' as one token: this is no POLAR model"
                )
        if Path(name).is_dir() and not (Path(name) / "config.json").exists():
            return PolarFormat(tokenizer=tokenizer)
        config = from_pretrained(AutoConfig.from_pretrained, "discriminator's configuration", name, **trusted)
        return PolarFormat.within(tokenizer, config)

    @staticmethod
    def within(tokenizer: Any, config: Any) -> "PolarFormat":
        """For a model whose window may be shorter; an answer takes a quarter at most, as in POLAR's own."""
        window = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
        # What the tokenizer adds at the start is not in the text.
        length = int(min(MAX_LENGTH, window - tokenizer.num_special_tokens_to_add()))
        return PolarFormat(tokenizer=tokenizer, max_length=length, max_response_length=length // 4)

    def text(self, prompt: Prompt, reference: str, candidate: str) -> str:
        """What is encoded; messages of a prompt are joined by line breaks."""
        asked = prompt if isinstance(prompt, str) else "\n".join(str(turn["content"]) for turn in prompt)
        ids = [self.tokenizer.encode(part) for part in (asked, reference, candidate)]
        answers = [part[-self.max_response_length :] for part in ids[1:]]
        # The end token, the separator and two line breaks take four.
        room = max(0, (self.max_length - 4 - sum(map(len, answers))) // 2)
        kept = (ids[0][len(ids[0]) - room :] if len(ids[0]) > room else ids[0], *answers)
        before, first, second = (self.tokenizer.decode(part, skip_special_tokens=True) for part in kept)
        return f"{before}\n{first}{SEPARATOR}{before}\n{second}{END}"


@dataclass(frozen=True, kw_only=True)
class Polar:
    """A POLAR model on this device."""

    needs_reference: ClassVar[bool] = True
    model: Any
    format: PolarFormat
    max_tokens: int
    """Padded tokens of one batch at most, one row at least."""

    @staticmethod
    def load(name: str, *, trust_remote_code: bool, max_tokens: int, device: torch.device) -> "Polar":
        """From a directory or the Hub: a reward model with its own code, or a sequence classifier.

        Raises:
            UsageError: It cannot be loaded, or has no pad token.
        """
        form = PolarFormat.load(name, trust_remote_code=trust_remote_code)
        tokenizer = form.tokenizer
        trusted = {"trust_remote_code": trust_remote_code}
        config = from_pretrained(AutoConfig.from_pretrained, "discriminator", name, **trusted)
        classifier = (config.architectures or [""])[0].endswith("ForSequenceClassification")
        family: Any = AutoModelForSequenceClassification if classifier else AutoModel
        weights = {"dtype": torch.float32, "use_safetensors": True}
        model = from_pretrained(family.from_pretrained, "discriminator", name, **weights, **trusted)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id in (None, tokenizer.convert_tokens_to_ids(END)):
            raise UsageError(f"the tokenizer of '{name}' needs a pad token that is not '{END}'")
        model.config.pad_token_id = tokenizer.pad_token_id
        model.eval().requires_grad_(False).to(device)
        return Polar(model=model, format=form, max_tokens=max_tokens)

    @torch.no_grad()
    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        """The logit of each candidate, its prompt's demonstration being the reference."""
        return self.logits(
            [self.format.text(c.example.prompt, reference_of(c), c.text) for c in candidates]
        ).tolist()

    def logits(self, texts: Sequence[str]) -> Tensor:
        """[N], of texts in POLAR's format; carries the gradient, if the model's weights want one."""
        rows: list[list[int]] = [self.format.tokenizer.encode(text) for text in texts]
        parts = batch_by_length([len(row) for row in rows], max_tokens=self.max_tokens)
        device = next(self.model.parameters()).device
        logits: list[Tensor] = []
        for part in parts:
            batch = [rows[index] for index in part]
            ids, mask = pad_right(batch, self.format.tokenizer.pad_token_id, device)
            logits.append(self.model(input_ids=ids, attention_mask=mask)[0].reshape(len(batch)).float())
        if not logits:
            return torch.zeros(0)
        places = torch.tensor([index for part in parts for index in part], device=device).argsort()
        return torch.cat(logits)[places]


def reference_of(candidate: Candidate) -> str:
    """The demonstration of the candidate's prompt.

    Raises:
        UniAPLError: There is none.
    """
    if candidate.reference is None:
        raise UniAPLError(
            f"row {candidate.example.row} has no demonstration, which this discriminator reads as a reference"
        )
    return candidate.reference
