"""One HTTP request with a deadline, for servers that are spoken to in JSON."""

import json
import time
from typing import Any, Literal

from uniapl.errors import UsageError


class PostingError(Exception):
    """A request has no answer; the next try may go better, unless the request itself is refused."""

    def __init__(self, what: str, *, for_good: bool = False) -> None:
        super().__init__(what)
        self.for_good = for_good


def ask(url: str, body: Any = None, *, timeout: float, method: Literal["GET", "POST"] = "POST") -> Any:
    """The JSON that a server answers with; None for an empty answer.

    Args:
        timeout: Seconds to connect, between two bytes, and until the last byte.

    Raises:
        PostingError: The server did not give a whole answer in time, or said that it will not.
    """
    import httpx

    deadline = time.monotonic() + timeout
    received = bytearray()
    try:
        with httpx.stream(method, url, json=body, timeout=timeout) as answer:
            for chunk in answer.iter_bytes():
                received += chunk
                # httpx's own limit is between two bytes: a server that drips would hold it for ever.
                if time.monotonic() > deadline:
                    raise PostingError(f"no whole answer within {timeout:g} s")
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # the last of a host that is no name
        raise PostingError(f"{type(error).__name__}: {str(error).rstrip('.')}") from error
    shown = received[:200].decode(errors="replace")
    if answer.status_code != 200:
        refused = 400 <= answer.status_code < 500 and answer.status_code not in (408, 429)
        raise PostingError(f"status {answer.status_code}: {shown}", for_good=refused)
    try:
        return json.loads(received) if received else None
    except (ValueError, RecursionError):
        raise PostingError(f"an answer that is no JSON: {shown}") from None


def check_address(key: str, url: str) -> None:
    """Whether a server can be asked at all.

    Args:
        key: Of the configuration that holds the address.

    Raises:
        UsageError: httpx is not installed, or the address is none.
    """
    try:
        import httpx
    except ImportError as error:
        raise UsageError(f"{key}: speaking to a server needs httpx: pip install 'uniapl[remote]'") from error
    try:
        address = httpx.URL(url)
        # As a connection does: an empty part, or one beyond 63 letters, is refused.
        address.raw_host.decode().encode("idna")
    except (httpx.InvalidURL, UnicodeError) as error:
        raise UsageError(f"{key} '{url}' is no address: {error}") from error
    if address.scheme not in ("http", "https") or not address.host:
        raise UsageError(f"{key} '{url}' is no address: it should be as http://host:port")
