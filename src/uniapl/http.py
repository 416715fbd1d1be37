"""JSON requests over HTTP, with a deadline and retries."""

import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from uniapl.errors import UsageError
from uniapl.threads import DeadlineError, call_with_deadline

Result = TypeVar("Result")

FIRST_PAUSE = 0.5
"""Seconds before the first retry; every further pause is twice as long. Our choice."""
LONGEST_PAUSE = 30.0


class RequestError(Exception):
    """A request failed.

    Args:
        status: HTTP status of the response, if there was one.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.permanent = status is not None and 400 <= status < 500 and status not in (408, 429)
        """The server rejected the request; a retry cannot succeed."""


def request_json(
    url: str, body: Any = None, *, timeout: float, method: Literal["GET", "POST"] = "POST"
) -> Any:
    """Return the JSON of the response; None if it is empty.

    Args:
        timeout: Seconds until the complete response.

    Raises:
        RequestError: The response is late, has another status than 200, or is not JSON.
    """
    import httpx

    try:
        # httpx limits the time between two bytes, but neither name resolution nor the whole request.
        response = call_with_deadline(lambda: httpx.request(method, url, json=body, timeout=timeout), timeout)
    except DeadlineError:
        raise RequestError(f"no complete response within {timeout:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise RequestError(f"{type(error).__name__}: {str(error).rstrip('.')}") from error
    excerpt = response.content[:200].decode(errors="replace")
    if response.status_code != 200:
        raise RequestError(f"status {response.status_code}: {excerpt}", status=response.status_code)
    try:
        return response.json() if response.content else None
    except (ValueError, RecursionError):
        raise RequestError(f"the response is not JSON: {excerpt}") from None


def with_retries(call: Callable[[], Result], max_retries: int) -> Result:
    """Return the result of `call`, which is repeated up to `max_retries` times after a RequestError."""
    attempt, pause = 1, FIRST_PAUSE
    while True:
        try:
            return call()
        except RequestError as error:
            if error.permanent or attempt > max_retries:
                raise RequestError(f"attempt {attempt}: {error}", status=error.status) from error
        time.sleep(pause)
        attempt, pause = attempt + 1, min(2 * pause, LONGEST_PAUSE)


def check_url(key: str, url: str) -> None:
    """Raise a UsageError if the URL in a configuration key is invalid or httpx is not installed."""
    try:
        import httpx
    except ImportError as error:
        raise UsageError(f"{key}: requests to a server need httpx: pip install 'uniapl[remote]'") from error
    try:
        parsed = httpx.URL(url)
        # Connecting encodes the host as IDNA, which refuses empty labels and labels over 63 characters.
        parsed.raw_host.decode().encode("idna")
        valid = parsed.scheme in ("http", "https") and bool(parsed.host)
    except (httpx.InvalidURL, UnicodeError):
        valid = False
    if not valid:
        raise UsageError(f"{key}: invalid URL '{url}'; expected http://host:port")
