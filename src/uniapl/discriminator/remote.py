"""A POLAR model behind a server of the user's: vLLM's /pooling or SGLang's /classify."""

import concurrent.futures
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from uniapl.discriminator import Candidate
from uniapl.discriminator.polar import PolarFormat, reference_of
from uniapl.errors import UniAPLError
from uniapl.http import PostingError, ask

FIRST_PAUSE = 0.5
"""Seconds before the second try; each further pause is twice as long. Our choice."""
LONGEST_PAUSE = 30.0


@dataclass(frozen=True, kw_only=True)
class Remote:
    """Scores over HTTP, several requests at a time, each with a deadline and a bounded number of tries."""

    needs_reference: ClassVar[bool] = True
    url: str
    """Of the server, without a path: http://host:port."""
    server: Literal["vllm", "sglang"]
    model: str
    """What SGLang is told to be asked; vLLM scores with the model that it serves."""
    format: PolarFormat
    timeout: float
    """Seconds for one try: to connect, between two bytes, and until the last byte."""
    max_retries: int
    """Further tries after a failed one."""
    batch_size: int = 16
    """Candidates of one request."""
    max_requests: int = 8
    """At the same time."""

    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        """The logit of each candidate. See :class:`Discriminator`.

        Raises:
            UniAPLError: The server did not give all of them in time; it names the server and what it did.
        """
        texts = [self.format.text(c.example.prompt, reference_of(c), c.text) for c in candidates]
        parts = [texts[start : start + self.batch_size] for start in range(0, len(texts), self.batch_size)]
        pool = concurrent.futures.ThreadPoolExecutor(self.max_requests)
        try:
            return [logit for part in pool.map(self._ask, parts) for logit in part]
        finally:
            # After a failure the requests that have not begun are not made.
            pool.shutdown(cancel_futures=True)

    def _ask(self, texts: Sequence[str]) -> list[float]:
        pause = FIRST_PAUSE
        tries = 0
        while True:
            tries += 1
            try:
                return self._read(self._post(texts), len(texts))
            except PostingError as error:
                if error.for_good or tries > self.max_retries:
                    raise UniAPLError(
                        f"the discriminator's server {self.url} failed {tries} times, at last: {error}. Once "
                        "it answers, --resume auto goes on from the last checkpoint"
                    ) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _post(self, texts: Sequence[str]) -> Any:
        """The JSON that the server answers with."""
        path, body = {
            "vllm": ("/pooling", {"input": list(texts)}),
            "sglang": ("/classify", {"model": self.model, "text": list(texts)}),
        }[self.server]
        return ask(self.url.rstrip("/") + path, body, timeout=self.timeout)

    def _read(self, answer: Any, count: int) -> list[float]:
        """The scores in an answer, if it has the form that the server documents."""
        try:
            if self.server == "sglang":
                scores = [item["embedding"][0] for item in answer]
            else:
                # One value per sequence, or one per token of which the last one counts.
                items = sorted(answer["data"], key=lambda item: item["index"])
                if [item["index"] for item in items] != list(range(count)):
                    raise PostingError(f"not one score for each of {count} texts")
                data = [item["data"] for item in items]
                scores = [row[-1][0] if isinstance(row[-1], list) else row[-1] for row in data]
            logits = [float(score) for score in scores]
        except (LookupError, TypeError, ValueError) as error:
            raise PostingError(f"an answer of another form: {type(error).__name__}: {error}") from None
        if len(logits) != count or not all(map(math.isfinite, logits)):
            finite = sum(map(math.isfinite, logits))
            raise PostingError(f"{finite} finite scores among {len(logits)} for {count} texts")
        return logits
