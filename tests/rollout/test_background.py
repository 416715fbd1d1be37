"""Work in threads: its order, its failures, and a program that ends while it goes on."""

import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from uniapl.rollout.background import in_background, in_threads

ENDS = """
import signal, sys
from uniapl.rollout.background import in_background
from uniapl.rollout.engines import Server

# A program that a shell has started behind its back ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
server = Server(url=sys.argv[1], temperature=1.0, timeout=600.0)

def generate():
    return server.generate([(5,)] * 3, seeds=[1, 2, 3], num_generations=1, max_tokens=2, stop_ids=[1])

try:
    generate() if sys.argv[2] == "in the foreground" else in_background(generate).result()
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_each_item_once_and_in_order() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item * item

    assert in_threads(work, list(range(20)), at_once=3) == [n * n for n in range(20)]
    assert sorted(begun) == list(range(20))
    assert in_threads(work, [], at_once=3) == []


def test_so_many_at_once() -> None:
    """Three wait for each other: fewer threads would wait for ever, a fourth item is begun only later."""
    meeting = threading.Barrier(3)
    assert in_threads(lambda item: meeting.wait(timeout=20) < 3, list(range(6)), at_once=3) == [True] * 6


def test_after_a_failure_nothing_is_begun() -> None:
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 2:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        in_threads(work, list(range(9)), at_once=1)
    assert begun == [0, 1, 2]


def test_a_failure_waits_for_what_is_under_way() -> None:
    """Nothing else is asked of a server while it still answers."""
    failed = threading.Event()
    ended: list[str] = []

    def work(item: str) -> None:
        if item == "fails":
            failed.set()
            raise ValueError(item)
        assert failed.wait(timeout=20)
        ended.append(item)

    with pytest.raises(ValueError, match="fails"):
        in_threads(work, ["slow", "fails"], at_once=2)
    assert ended == ["slow"]


def test_a_failure_in_the_background_is_raised_where_it_is_waited_for() -> None:
    def fails() -> None:
        raise ValueError("behind")

    future = in_background(fails)
    with pytest.raises(ValueError, match="behind"):
        future.result()


@pytest.mark.parametrize("where", ["in the foreground", "in the background"])
def test_a_program_ends_although_a_server_does_not_answer(where: str) -> None:
    asked, over = threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.set()
            over.wait(timeout=120)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    child = subprocess.Popen([sys.executable, "-c", ENDS, url, where])
    try:
        assert asked.wait(timeout=60)
        child.send_signal(signal.SIGINT)
        # An answer would be waited for ten minutes.
        assert child.wait(timeout=60) == 130
    finally:
        child.kill()
        over.set()
        server.shutdown()
        server.server_close()
