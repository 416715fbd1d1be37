"""The discriminator behind a server on loopback: correct responses and every kind of failure."""

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

import uniapl
from support.candidates import CANDIDATES, candidate, polar_tokenizer
from support.runs import lines, recipe, timeless, train
from support.tiny import save_model
from uniapl.discriminator.polar import PolarFormat
from uniapl.discriminator.remote import Remote
from uniapl.http import RequestError, check_url, request_json

Reply = Callable[[http.server.BaseHTTPRequestHandler, dict[str, Any]], None]


def logit_of(text: str) -> float:
    return sum(map(ord, text)) / 1000


def send(handler: http.server.BaseHTTPRequestHandler, answer: Any, status: int = 200) -> None:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def honest(handler: http.server.BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    """Respond as the servers document; vLLM's items can have any order."""
    if handler.path == "/classify":
        assert asked["model"] == "polar"
        send(handler, [{"embedding": [logit_of(text)]} for text in asked["text"]])
    else:
        assert handler.path == "/pooling"
        data = [{"index": i, "data": [[9.0], [logit_of(text)]]} for i, text in enumerate(asked["input"])]
        send(handler, {"data": data[::-1]})


@contextmanager
def serving(reply: Reply) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply(self, asked)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uniapl.http.FIRST_PAUSE", 0.01)


def remote(url: str, server: Literal["vllm", "sglang"] = "vllm", **settings: Any) -> Remote:
    form = PolarFormat(tokenizer=polar_tokenizer())
    limits = {"timeout": 5.0, "max_retries": 2, "batch_size": 3} | settings
    return Remote(url=url, server=server, model="polar", format=form, **limits)


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_scores_come_back_in_the_order_of_the_candidates(server: Literal["vllm", "sglang"]) -> None:
    candidates = CANDIDATES * 5
    with serving(honest) as url:
        subject = remote(url, server)
        texts = [subject.format.text(c.example.prompt, "aaa", c.text) for c in candidates]
        assert subject.score(candidates) == [logit_of(text) for text in texts]
        assert subject.score([]) == []


def test_vllm_s_score_of_a_whole_sequence() -> None:
    def reply(handler: Any, asked: dict[str, Any]) -> None:
        send(handler, {"data": [{"index": i, "data": [0.25]} for i in range(len(asked["input"]))]})

    with serving(reply) as url:
        assert remote(url).score(CANDIDATES) == [0.25] * 4


def nan_answer(handler: Any, asked: dict[str, Any]) -> None:
    send(handler, {"data": [{"index": i, "data": [float("nan")]} for i in range(len(asked["input"]))]})


def hangs(handler: Any, asked: dict[str, Any]) -> None:
    time.sleep(2)


def drips(handler: Any, asked: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def cuts(handler: Any, asked: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"data"')
    handler.connection.close()


TROUBLES: dict[str, tuple[Reply, str]] = {
    "status 500": (lambda h, a: send(h, b"boom", 500), "status 500: boom"),
    "no JSON": (lambda h, a: send(h, b"<html>"), "not JSON: <html>"),
    "another form": (lambda h, a: send(h, {"error": "x"}), "unexpected response: KeyError"),
    "too few": (
        lambda h, a: send(h, {"data": [{"index": 0, "data": [1.0]}]}),
        "finite scores among|unexpected response: KeyError",
    ),
    "NaN": (nan_answer, "0 finite scores among"),
    "one twice": (
        lambda h, a: send(h, {"data": [{"index": 0, "data": [1.0]}] * len(a["input"])}),
        "finite scores among|unexpected response: KeyError",
    ),
    "a string": (
        lambda h, a: send(h, {"data": [{"index": i, "data": ["x"]} for i in range(len(a["input"]))]}),
        "unexpected response: ValueError",
    ),
    "hangs": (hangs, "ReadTimeout|within 0.4 s"),
    "drips": (drips, "no complete response within 0.4 s"),
    "cuts": (cuts, "RemoteProtocolError|ReadError"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_server_in_trouble_ends_in_bounded_time_with_its_name(trouble: str) -> None:
    reply, message = TROUBLES[trouble]
    with serving(reply) as url:
        started = time.monotonic()
        with pytest.raises(uniapl.UniAPLError, match=rf"{url} failed, attempt 3: .*({message})"):
            # Only a silent server needs a short deadline: on a busy machine a response can take longer.
            remote(url, timeout=0.4 if "0.4 s" in message else 5.0).score(CANDIDATES)
        assert time.monotonic() - started < 20, "three tries, and pauses"


def test_a_server_that_is_not_there() -> None:
    with serving(honest) as url:
        pass
    with pytest.raises(uniapl.UniAPLError, match="failed, attempt 3: ConnectError"):
        remote(url).score(CANDIDATES)


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".org"])
def test_an_invalid_host_name(host: str) -> None:
    """Labels of a host name have 1 to 63 characters."""
    with pytest.raises(uniapl.UsageError, match=r"discriminator.url: invalid URL 'http://.*'"):
        check_url("discriminator.url", f"http://{host}:8000")
    with pytest.raises(RequestError, match="UnicodeError"):
        request_json(f"http://{host}:8000", timeout=5.0)


def test_valid_host_names() -> None:
    for host in ("localhost", "my_host.", "127.0.0.1", "[::1]", "bücher.example", "a" * 63 + ".org"):
        check_url("discriminator.url", f"http://{host}:8000")


def test_a_response_that_is_nested_too_deeply() -> None:
    def deep(handler: Any, asked: dict[str, Any]) -> None:
        send(handler, b"[" * 100_000)

    with serving(deep) as url, pytest.raises(RequestError, match="not JSON"):
        request_json(url, {}, timeout=5.0)


def test_a_request_that_is_refused_is_not_repeated() -> None:
    calls: list[int] = []

    def refuse(handler: Any, asked: dict[str, Any]) -> None:
        calls.append(1)
        send(handler, b"unknown model", 404)

    said = "failed, attempt 1: status 404: unknown model"
    with serving(refuse) as url, pytest.raises(uniapl.UniAPLError, match=said):
        remote(url).score([candidate("a")])
    assert len(calls) == 1


def test_a_server_that_recovers_gives_the_same_scores() -> None:
    failed: list[int] = []

    def shaky(handler: Any, asked: dict[str, Any]) -> None:
        if len(failed) < 2:
            failed.append(1)
            send(handler, b"busy", 503 if len(failed) == 1 else 429)
        else:
            honest(handler, asked)

    with serving(honest) as url, serving(shaky) as unsteady:
        assert remote(unsteady).score(CANDIDATES) == remote(url).score(CANDIDATES)


def test_a_run_whose_server_dies_stops_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    polar_tokenizer().save_pretrained(tmp_path / "polar")
    calls: list[int] = []

    def mortal(handler: Any, asked: dict[str, Any]) -> None:
        calls.append(1)
        if len(calls) > 2:
            send(handler, b"dead", 500)
        else:
            any_name(handler, asked)

    def values(url: str, output: str) -> dict[str, Any]:
        adversary = {"kind": "remote", "url": url, "model_name_or_path": str(tmp_path / "polar")}
        settings = {**adversary, "max_retries": 1, "timeout": 5.0}
        return recipe(model, tmp_path / output, method="a-grpo", save_steps=1, discriminator=settings)

    def any_name(handler: Any, asked: dict[str, Any]) -> None:
        honest(handler, {**asked, "model": "polar"})

    with serving(any_name) as url, serving(mortal) as dying:
        train(values(url, "whole"))
        with pytest.raises(uniapl.UniAPLError, match="failed, attempt 2: status 500: dead"):
            train(values(dying, "broken"))
        train(values(url, "broken") | {"resume": "auto"})
    whole, broken = (timeless(lines(tmp_path / name / "metrics.jsonl")) for name in ("whole", "broken"))
    assert whole == broken
