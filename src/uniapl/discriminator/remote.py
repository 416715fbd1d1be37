"""A POLAR model behind a server: vLLM's /pooling or SGLang's /classify."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from uniapl.discriminator import Candidate
from uniapl.discriminator.polar import PolarFormat, reference_of
from uniapl.errors import UniAPLError
from uniapl.http import RequestError, request_json, with_retries
from uniapl.threads import map_in_threads


@dataclass(frozen=True, kw_only=True)
class Remote:
    """Scores over HTTP with parallel requests, each with a deadline and a limited number of retries."""

    needs_reference: ClassVar[bool] = True
    url: str
    """The server without a path: http://host:port."""
    server: Literal["vllm", "sglang"]
    model: str
    """Model name in SGLang's requests; vLLM scores with the model that it serves."""
    format: PolarFormat
    timeout: float
    """Seconds for one attempt of a request."""
    max_retries: int
    batch_size: int = 16
    """Candidates per request."""
    max_requests: int = 8
    """Requests at the same time."""

    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        """Return the logit of each candidate. See :class:`Discriminator`.

        Raises:
            UniAPLError: A request failed in every attempt.
        """
        texts = [self.format.text(c.example.prompt, reference_of(c), c.text) for c in candidates]
        batches = [texts[start : start + self.batch_size] for start in range(0, len(texts), self.batch_size)]
        try:
            scores = map_in_threads(
                lambda batch: with_retries(lambda: self._request(batch), self.max_retries),
                batches,
                num_threads=self.max_requests,
            )
        except RequestError as error:
            raise UniAPLError(
                f"the discriminator server {self.url} failed, {error}. Once it responds again, --resume auto "
                "continues from the last checkpoint"
            ) from None
        return [score for batch in scores for score in batch]

    def _request(self, texts: list[str]) -> list[float]:
        path, body = {
            "vllm": ("/pooling", {"input": texts}),
            "sglang": ("/classify", {"model": self.model, "text": texts}),
        }[self.server]
        response = request_json(self.url.rstrip("/") + path, body, timeout=self.timeout)
        try:
            scores = [float(score) for score in self._scores(response)]
        except (LookupError, TypeError, ValueError) as error:
            raise RequestError(f"unexpected response: {error!r}") from None
        finite = sum(map(math.isfinite, scores))
        if not len(scores) == finite == len(texts):
            raise RequestError(f"{finite} finite scores among {len(scores)} for {len(texts)} texts")
        return scores

    def _scores(self, response: Any) -> list[Any]:
        """The scores in a response of the documented form, in the order of the texts."""
        if self.server == "sglang":
            return [item["embedding"][0] for item in response]
        items = {item["index"]: item["data"] for item in response["data"]}
        # A sequence has one value, or one per token, of which the last counts.
        last = [items[index][-1] for index in range(len(response["data"]))]
        return [value[0] if isinstance(value, list) else value for value in last]
