"""A teacher behind `vllm serve`, which returns log-probabilities of prompt tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uniapl.errors import UniAPLError, UsageError
from uniapl.http import RequestError, request_json, with_retries
from uniapl.threads import map_in_threads
from uniapl.types import MicroBatch

PROBES = (
    "The quick brown fox, 1234.5 + 67!\n",
    "Zażółć gęślą jaźń: 中文 العربية 🙂",
    "def f(x):\n\treturn x ** 2\n",
)
"""Texts on which the tokenizers of policy and teacher must agree, in addition to prompts."""


@dataclass(frozen=True, kw_only=True)
class TeacherServer:
    """Asks a vLLM server, with parallel requests. See :class:`uniapl.teacher.Teacher`.

    The server's log-probabilities are at temperature 1.
    """

    url: str
    """The server without a path: http://host:port."""
    top_k: int
    """Most likely tokens per position; 0 reads the log-probability of the token itself."""
    timeout: float
    """Seconds for one attempt of a request."""
    max_retries: int
    max_requests: int = 8
    """Requests at the same time."""

    def check(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int) -> None:
        """Compare the server with the policy before training.

        Args:
            texts: Prompts, which must have the same tokens on both sides.
            longest: Tokens of the longest sequence that it will read.

        Raises:
            UsageError: The server does not answer, tokenizes differently or reads fewer tokens.
        """
        try:
            for text in [*PROBES, *texts]:
                body = {"prompt": text, "add_special_tokens": False}
                response = self._request("/tokenize", body)
                own = tokenizer.encode(text, add_special_tokens=False)
                if response["tokens"] != own:
                    raise UsageError(
                        f"teacher.url: {self.url} tokenizes {text[:40]!r} as {response['tokens'][:8]}..., "
                        f"the policy as {own[:8]}...: a teacher needs the policy's tokenizer"
                    )
                if response["max_model_len"] < longest + 1:
                    raise UsageError(
                        f"teacher.url: {self.url} reads at most {response['max_model_len']} tokens, but a "
                        f"prompt and its completion may have {longest}, and the server samples one more: "
                        f"start it with --max-model-len {longest + 1}"
                    )
        except (RequestError, LookupError, TypeError) as error:
            raise UsageError(
                f"teacher.url: {self.url} is not a vLLM server that is ready: {error!r}"
            ) from error

    def read(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """See :meth:`uniapl.teacher.Teacher.read`.

        Raises:
            UniAPLError: A request failed in every attempt.
        """
        rows = [(number, row) for number, batch in enumerate(batches) for row in _rows_of(batch)]
        sequences = [
            batches[number].input_ids[row][batches[number].attention_mask[row]].tolist()
            for number, row in rows
        ]
        try:
            answers = map_in_threads(
                lambda ids: with_retries(lambda: self._logprobs(ids), self.max_retries),
                sequences,
                num_threads=self.max_requests,
            )
        except RequestError as error:
            raise UniAPLError(
                f"the teacher's server {self.url} failed, {error}. Once it responds again, --resume auto "
                "continues from the last checkpoint"
            ) from None
        found = [_empty(batch, max(1, self.top_k)) for batch in batches]
        for (number, row), answer in zip(rows, answers, strict=True):
            batch, (ids, logprobs) = batches[number], found[number]
            # A mask of the row without padding. The answer has no entry for the first token.
            kept = batch.rollout_mask[row][batch.attention_mask[row]].tolist()[1:]
            entries = [entry for entry, keep in zip(answer, kept, strict=True) if keep]
            mask = batch.rollout_mask[row]
            ids[row, mask] = ids.new_tensor([[token for token, _ in entry] for entry in entries])
            logprobs[row, mask] = logprobs.new_tensor([[value for _, value in entry] for entry in entries])
        return [
            replace(batch, teacher_ids=ids if self.top_k else None, teacher_logprobs=logprobs)
            for batch, (ids, logprobs) in zip(batches, found, strict=True)
        ]

    def _logprobs(self, ids: list[int]) -> list[list[tuple[int, float]]]:
        """For each token after the first, its id and log-probability, or those of the most likely tokens."""
        wanted = max(1, self.top_k)
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": wanted}
        response = self._request("/v1/completions", body)
        try:
            positions = response["choices"][0]["prompt_logprobs"][1:]
            if len(positions) != len(ids) - 1:
                raise RequestError(f"log-probabilities of {len(positions) + 1} tokens for {len(ids)}")
            entries = [
                [(int(token), float(value["logprob"])) for token, value in position.items()]
                for position in positions
            ]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(f"unexpected response: {error!r}") from None
        if self.top_k:
            chosen = [sorted(entry, key=lambda pair: -pair[1])[:wanted] for entry in entries]
        else:
            chosen = [
                [p for p in entry if p[0] == token] for entry, token in zip(entries, ids[1:], strict=True)
            ]
        if any(len(entry) != wanted or not all(math.isfinite(p) for _, p in entry) for entry in chosen):
            raise RequestError(f"fewer than {wanted} finite log-probabilities per token")
        return chosen

    def _request(self, path: str, body: dict[str, Any]) -> Any:
        return request_json(self.url.rstrip("/") + path, body, timeout=self.timeout)


def _rows_of(batch: MicroBatch) -> list[int]:
    """The rows that are rollouts."""
    return batch.rollout_mask.any(-1).nonzero().flatten().tolist()


def _empty(batch: MicroBatch, k: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [B, T, k] of zeros."""
    shape, device = (*batch.input_ids.shape, k), batch.input_ids.device
    return torch.zeros(shape, dtype=torch.int64, device=device), torch.zeros(shape, device=device)
