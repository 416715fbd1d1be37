"""An OpenAI-compatible chat endpoint on loopback that answers, counts, and misbehaves as a test wants."""

import http.server
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

Handler = http.server.BaseHTTPRequestHandler


@dataclass
class Endpoint:
    """What a test says the server shall do, and what the server has seen."""

    reply: "Reply"
    models: tuple[str, ...] = ("expert",)
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=dict)
    """Of the requests for each prompt."""
    keys: set[str | None] = field(default_factory=set)
    listed: int = 0
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def counts(self) -> Counter[str]:
        return Counter(body["messages"][-1]["content"] for body in self.asked)


Reply = Callable[[Endpoint, Handler, dict[str, Any]], None]


def send(handler: Handler, answer: Any, status: int = 200, **headers: str) -> None:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def completion(
    content: Any, *, finish_reason: str | None = "stop", model: str = "expert", **message: Any
) -> dict[str, Any]:
    """As the API's reference has it, with three tokens of prompt and two of answer."""
    message = {"role": "assistant", "content": content} | message
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def echo(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
    """The prompt in capitals."""
    send(handler, completion(body["messages"][-1]["content"].upper()))


def says(*contents: Any, **settings: Any) -> Reply:
    """One content after the other, each for ever once the others are through."""

    def reply(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        send(handler, completion(contents[min(len(endpoint.asked), len(contents)) - 1], **settings))

    return reply


def first(trouble: Reply, times: int = 1, then: Reply = echo) -> Reply:
    """Trouble with each prompt's first requests."""

    def reply(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        seen = endpoint.counts[body["messages"][-1]["content"]]
        (trouble if seen <= times else then)(endpoint, handler, body)

    return reply


def status(number: int, said: Any = b"boom", **headers: str) -> Reply:
    return lambda endpoint, handler, body: send(handler, said, number, **headers)


def later(seconds: float) -> Reply:
    """429 with a date: a second's fraction is cut off, so one is added."""

    def reply(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
        send(handler, b"", 429, Retry_After=formatdate(time.time() + seconds + 1, usegmt=True))

    return reply


def hangs(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
    time.sleep(4)


def drips(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
    """An answer of the right form, too late."""
    whole = json.dumps(completion("late")).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(40 + len(whole)))
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)
    handler.wfile.write(whole)


def cuts(endpoint: Endpoint, handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.close_connection = True


@contextmanager
def serving(reply: Reply = echo, models: tuple[str, ...] = ("expert",)) -> Iterator[Endpoint]:
    endpoint = Endpoint(reply, models)

    class Served(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            endpoint.listed += 1
            send(self, {"object": "list", "data": [{"id": name} for name in endpoint.models]})

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                endpoint.asked.append(body)
                prompt = body["messages"][-1]["content"]
                endpoint.times.setdefault(prompt, []).append(time.monotonic())
                endpoint.keys.add(self.headers["Authorization"])
                endpoint.at_once += 1
                endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
            try:
                endpoint.reply(endpoint, self, body)
            except OSError:
                # The other side has gone, as a test wants it.
                self.close_connection = True
            finally:
                with endpoint.lock:
                    endpoint.at_once -= 1

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Served)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
