"""Requests to the endpoint: the `openai` client, with a deadline for each try and rules for giving up."""

import asyncio
import importlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import openai

from uniapl.collect.cache import Reply
from uniapl.collect.parsing import UnreadableContentError, account_problem, parse_reply
from uniapl.errors import UniAPLError, UsageError

# The HTTP library of the installed openai: httpx, or httpx2 since openai 3.
httpx = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])

MAX_CONNECT_FAILURES = 5
"""Failures to connect, before any response, after which the endpoint counts as unreachable. Our choice."""
MAX_CONSECUTIVE_FAILURES = 8
"""Requests that fail for good, with no success in between, before the run stops. Our choice."""
RETRIED_STATUSES = (408, 409, 429)
"""Statuses below 500 that the openai client retries."""
PROMPT_STATUSES = (400, 413, 422)
"""Statuses that may concern one prompt only, e.g. one that is too long for the model."""


class RequestFailedError(Exception):
    """A request failed and is not tried again."""

    def __init__(self, message: str, *, refused: bool = False, fatal: bool = False) -> None:
        super().__init__(message)
        self.refused = refused
        """The server rejects the request itself."""
        self.fatal = fatal
        """Every other request would fail in the same way."""


class PermanentError(openai.OpenAIError):
    """A failure that every try would repeat. The openai client does not retry errors of its own kind."""

    def __init__(self, message: str, *, refused: bool = False, fatal: bool = False) -> None:
        super().__init__(message)
        self.refused, self.fatal = refused, fatal


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Address, key and patience for an OpenAI-compatible server.

    Raises:
        UsageError: The URL is invalid.
    """

    url: str
    key_variable: str
    key: str | None
    timeout: float
    """Seconds for one try, until the last byte."""
    max_retries: int

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:
            valid = False
        if not valid:
            shown = self.url.rpartition("@")[2]
            raise UsageError(f"--url: invalid URL '{shown}'; expected for example http://host:8000/v1")

    @property
    def shown(self) -> str:
        """The URL without user name, password and query."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class _HttpClient(openai.DefaultAsyncHttpxClient):
    """The HTTP client under the openai client; it also parses replies, so that malformed ones are retried."""

    def __init__(self, endpoint: Endpoint, concurrency: int) -> None:
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        super().__init__(limits=limits, follow_redirects=False)
        self.endpoint = endpoint
        self.connect_failures = 0
        self.reached = False

    async def send(self, request: Any, **options: Any) -> Any:
        """Send one try of a request. The openai client retries the errors of httpx."""
        if self.endpoint.key is None:
            request.headers.pop("Authorization", None)
        try:
            # The timeouts of httpx hold between two bytes: a server that drips would never reach them.
            async with asyncio.timeout(self.endpoint.timeout):
                response = await super().send(request, **options)
        except TimeoutError:
            raise httpx.ReadTimeout("deadline exceeded", request=request) from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self.connect_failures += 1
            if not self.reached and self.connect_failures >= MAX_CONNECT_FAILURES:
                raise PermanentError(f"cannot be reached ({_described(error)})", fatal=True) from None
            raise
        self.reached = True
        found = _json(response)
        if (problem := account_problem(response.status_code, found)) is not None:
            raise PermanentError(problem, refused=True, fatal=True)
        if response.is_success:
            try:
                models = request.method == "GET"
                parsed = [str(model["id"]) for model in found["data"]] if models else parse_reply(found)
                response.extensions["parsed"] = parsed
            except UnreadableContentError as error:
                raise PermanentError(str(error)) from None
            except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as e:
                message = f"malformed response ({e}): {response.text}"
                raise httpx.DecodingError(message, request=request) from None
        return response


def _json(response: Any) -> Any:
    """The body; None if it is not JSON."""
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError):
        return None


def _connected(endpoint: Endpoint, concurrency: int) -> openai.AsyncOpenAI:
    parts = urlsplit(endpoint.url)
    return openai.AsyncOpenAI(
        base_url=parts._replace(query="", fragment="").geturl(),
        default_query=dict(parse_qsl(parts.query)),
        api_key=endpoint.key or "none",
        max_retries=endpoint.max_retries,
        timeout=httpx.Timeout(endpoint.timeout, connect=min(endpoint.timeout, 10.0)),
        http_client=_HttpClient(endpoint, concurrency),
    )


async def _parsed(request: Awaitable[Any], endpoint: Endpoint) -> Any:
    try:
        return (await request).extensions["parsed"]
    except (openai.APIError, PermanentError) as error:
        raise _failure(error, endpoint) from None


def _failure(error: openai.APIError | PermanentError, endpoint: Endpoint) -> RequestFailedError:
    def clean(text: str) -> str:
        """One short line without the key, which a server may repeat."""
        return " ".join((text.replace(endpoint.key, "[key]") if endpoint.key else text).split())[:300]

    cause = error.__cause__ or error
    if isinstance(error, PermanentError):
        return RequestFailedError(clean(str(error)), refused=error.refused, fatal=error.fatal)
    if isinstance(error, openai.APIStatusError):
        status, body = error.status_code, error.body
        if isinstance(body, dict):
            body = body.get("message") or body.get("detail") or body
        reason = f"status {status}: {clean(str(body or ''))}"
        if (wait := error.response.headers.get("retry-after")) is not None:
            reason += f" (Retry-After: {clean(wait)})"
        if status not in RETRIED_STATUSES and status < 500:
            if status in (401, 403):
                reason += f"; the key is read from the environment variable {endpoint.key_variable}"
            if status == 404:
                reason += "; check --url (most end in /v1) and --model"
            return RequestFailedError(reason, refused=True, fatal=status not in PROMPT_STATUSES)
    elif isinstance(cause, httpx.ReadTimeout):
        reason = f"no complete response within {endpoint.timeout:g} s"
    else:
        reason = clean(_described(cause))
    tries = int(error.request.headers["x-stainless-retry-count"]) + 1
    return RequestFailedError(f"failed {tries} times, the last time with: {reason}")


def only_model(endpoint: Endpoint) -> str:
    """The name of the server's only model.

    Raises:
        UsageError: The server has several models, or none.
        UniAPLError: The server does not list its models.
    """

    async def names() -> list[str]:
        async with _connected(endpoint, 1) as client:
            return await _parsed(client.get("/models", cast_to=httpx.Response), endpoint)

    try:
        models = asyncio.run(names())
    except RequestFailedError as error:
        raise _stopped(endpoint, error, "Set --model to skip the list of models") from None
    if len(models) != 1:
        listed = ", ".join(models) or "none"
        raise UsageError(f"{endpoint.shown} has {len(models)} models ({listed:.1000}): set --model")
    return models[0]


async def request_all(
    bodies: Mapping[str, dict[str, Any]],
    endpoint: Endpoint,
    *,
    concurrency: int,
    received: Callable[[str, Reply], None],
    failed: Callable[[str, str], None],
) -> None:
    """Send every request, at most `concurrency` at a time.

    Args:
        bodies: Request bodies by key.
        received: Called with the key and the reply of each request that succeeds, as it arrives.
        failed: Called with the key and the reason for each request that fails.

    Raises:
        UniAPLError: The endpoint cannot be reached, or no longer replies.
        UsageError: The endpoint rejects the requests.
    """
    waiting = iter(bodies.items())
    consecutive = 0

    async def work(client: openai.AsyncOpenAI) -> None:
        nonlocal consecutive
        for key, body in waiting:
            request = client.post("/chat/completions", cast_to=httpx.Response, body=body)
            try:
                parsed = await _parsed(request, endpoint)
            except RequestFailedError as error:
                consecutive += 1
                failed(key, str(error))
                if error.fatal or consecutive >= MAX_CONSECUTIVE_FAILURES:
                    remedy = "Replies received so far are kept: the same command continues with the others"
                    raise _stopped(endpoint, error, remedy) from None
            else:
                consecutive = 0
                received(key, Reply(url=endpoint.shown, **parsed))

    async with _connected(endpoint, concurrency) as client:
        workers = [asyncio.create_task(work(client)) for _ in range(min(concurrency, len(bodies)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": .")


def _stopped(endpoint: Endpoint, error: RequestFailedError, remedy: str) -> UniAPLError:
    kind = UsageError if error.refused else UniAPLError
    return kind(f"{endpoint.shown}: {error}. {remedy}")
