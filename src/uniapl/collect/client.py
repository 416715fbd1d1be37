"""One request to the endpoint, repeated where another try may help."""

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from uniapl.collect.cache import Answer
from uniapl.errors import UsageError

FIRST_PAUSE = 1.0
"""Seconds before the second try at most; each further pause is up to twice as long. Our choice."""
LONGEST_PAUSE = 60.0
LONGEST_RETRY_AFTER = 300.0
"""A server that asks for more is asked again after this."""
MOST_UNREACHED = 5
"""Tries that may fail to connect before anything was reached. Our choice."""
PASSING = (408, 409, 425, 429)
"""Statuses below 500 that another try may overcome."""
ROW_ALONE = (400, 413, 422)
"""Statuses that may concern one prompt only, e.g. one that is too long for the model."""

Read = TypeVar("Read")


class GivenUpError(Exception):
    """A request has no answer, and no further try will be made."""

    def __init__(self, what: str, *, refused: bool = False, for_all: bool = False) -> None:
        super().__init__(what)
        self.refused = refused
        """The server does not want the request, rather than being in trouble."""
        self.for_all = for_all
        """Every other request will end in the same way."""


class _Failed(Exception):
    def __init__(self, what: str, *, retry_after: float = 0.0) -> None:
        """One try failed; the next one may go better."""
        super().__init__(what)
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where to ask, and how patiently."""

    url: httpx.URL
    key_variable: str
    key: str | None
    timeout: float
    """Seconds for one try, until the last byte."""
    max_retries: int

    @property
    def shown(self) -> str:
        """The address without anything secret."""
        return str(self.url.copy_with(userinfo=b"", query=None, fragment=None))


def checked_url(text: str) -> httpx.URL:
    """An address that can be asked.

    Raises:
        UsageError: It is none.
    """
    shown = text.rpartition("@")[2]
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        raise UsageError(f"--url '{shown}' is no address: it should be as http://host:8000/v1") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"--url '{shown}' is no address: it should be as http://host:8000/v1")
    return url


class Client:
    """The requests of one run; to be used in `async with`."""

    def __init__(self, endpoint: Endpoint, *, concurrency: int) -> None:
        self.endpoint = endpoint
        self._unreached = 0
        self._reached = False
        key = endpoint.key
        authorization = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(
            headers={"Content-Type": "application/json", **authorization},
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            timeout=httpx.Timeout(endpoint.timeout, connect=min(endpoint.timeout, 10.0)),
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def models(self) -> list[str]:
        """The names of the models that the server has.

        Raises:
            GivenUpError: It does not say.
        """
        return await self._repeat("GET", "/models", None, lambda found: [str(m["id"]) for m in found["data"]])

    async def ask(self, body: dict[str, Any]) -> Answer:
        """The answer to one request.

        Raises:
            GivenUpError: There is none.
        """
        return await self._repeat("POST", "/chat/completions", body, self._answer)

    async def _repeat(
        self, method: str, path: str, body: dict[str, Any] | None, read: Callable[[Any], Read]
    ) -> Read:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.endpoint.max_retries + 1),
            retry=retry_if_exception_type(_Failed),
            wait=_pause,
            reraise=True,
        )
        try:
            return await retrying(self._try, method, path, body, read)
        except _Failed as error:
            tries = retrying.statistics["attempt_number"]
            raise GivenUpError(f"failed {tries} times, at last: {error}") from None

    async def _try(
        self, method: str, path: str, body: dict[str, Any] | None, read: Callable[[Any], Read]
    ) -> Read:
        url = self.endpoint.url.copy_with(path=self.endpoint.url.path.rstrip("/") + path)
        content = None if body is None else json.dumps(body)
        try:
            # httpx's own limit is between two bytes: a server that drips would hold it for ever.
            async with asyncio.timeout(self.endpoint.timeout):
                answer = await self._http.request(method, url, content=content)
        except TimeoutError:
            raise _Failed(f"no whole answer within {self.endpoint.timeout:g} s") from None
        except httpx.HTTPError as error:
            what = self._clean(f"{type(error).__name__}: {error}".rstrip(": ."))
            if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
                self._unreached += 1
                if not self._reached and self._unreached >= MOST_UNREACHED:
                    what = f"cannot be reached ({what}): is the server running?"
                    raise GivenUpError(what, for_all=True) from None
            raise _Failed(what) from None
        self._reached = True
        self._check_status(answer)
        try:
            return read(json.loads(answer.content))
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
            raise _Failed(f"an answer of another form: {self._clean(answer.text)}") from None

    def _check_status(self, answer: httpx.Response) -> None:
        status = answer.status_code
        if status == 200:
            return
        what = f"status {status}: {self._clean(_message(answer))}"
        if status in PASSING or status >= 500:
            raise _Failed(what, retry_after=_retry_after(answer.headers.get("retry-after", "")))
        if status in (401, 403):
            what += f"; the key is read from the environment variable {self.endpoint.key_variable}"
        if status == 404:
            what += "; look at --url (most end in /v1) and --model"
        raise GivenUpError(what, refused=True, for_all=status not in ROW_ALONE)

    def _answer(self, found: Any) -> Answer:
        choice = found["choices"][0]
        message, usage = choice["message"], found.get("usage") or {}
        texts = [message.get("content"), message.get("reasoning_content") or message.get("reasoning")]
        content, reasoning = ("" if text is None else text for text in texts)
        if not isinstance(content, str) or not isinstance(reasoning, str):
            raise TypeError("the content is no text")
        finish_reason, model = choice.get("finish_reason"), found.get("model")
        if finish_reason in ("abort", "error"):
            raise _Failed(f"the server broke off: finish_reason '{finish_reason}'")
        return Answer(
            content=content,
            reasoning=reasoning,
            finish_reason=None if finish_reason is None else str(finish_reason),
            model=None if model is None else str(model),
            url=self.endpoint.shown,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )

    def _clean(self, text: str) -> str:
        """For people: short, and without the key, which servers may repeat."""
        if self.endpoint.key:
            text = text.replace(self.endpoint.key, "[key]")
        return " ".join(text.split())[:300]


def _message(answer: httpx.Response) -> str:
    """What the server says of a failure, wherever it says it."""
    try:
        found = json.loads(answer.content)
        error = found.get("error") or found
        said = error if isinstance(error, str) else error.get("message") or error.get("detail")
        return str(said or error)
    except (ValueError, AttributeError, RecursionError):
        return answer.text


def _retry_after(text: str) -> float:
    """Seconds, given as such or as a date."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = parsedate_to_datetime(text)
        except (ValueError, TypeError):
            return 0.0
        seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return min(seconds, LONGEST_RETRY_AFTER) if seconds > 0 else 0.0


def _pause(state: RetryCallState) -> float:
    """What the server asks for, and as many seconds more as keep requests from coming back together."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, _Failed) else 0.0
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (state.attempt_number - 1))
    return asked + random.uniform(longest / 2, longest)
