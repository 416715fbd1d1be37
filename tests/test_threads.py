"""Calls in threads: order, failures, deadlines, and a program that exits while one hangs."""

import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from uniapl.threads import DeadlineError, call_with_deadline, in_background, map_in_threads

ENDS = """
import signal, sys
from uniapl.rollout import SampleRequest
from uniapl.rollout.engines import Server
from uniapl.threads import in_background

# A background process of a shell ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
server = Server(url=sys.argv[1], timeout=600.0)

def generate():
    request = SampleRequest(prompts=[(5,)] * 3, seeds=[1, 2, 3], num_generations=1)
    return server.generate(request, {})

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

    assert map_in_threads(work, list(range(20)), num_threads=3) == [n * n for n in range(20)]
    assert sorted(begun) == list(range(20))
    assert map_in_threads(work, [], num_threads=3) == []


def test_calls_run_in_parallel() -> None:
    """Three calls wait for each other: with fewer threads they would wait forever."""
    meeting = threading.Barrier(3)
    assert (
        map_in_threads(lambda item: meeting.wait(timeout=20) < 3, list(range(6)), num_threads=3) == [True] * 6
    )


def test_after_a_failure_no_item_is_started() -> None:
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 2:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        map_in_threads(work, list(range(9)), num_threads=1)
    assert begun == [0, 1, 2]


def test_a_failure_waits_for_running_calls() -> None:
    """No call is left running, so that a server gets no other request at the same time."""
    failed = threading.Event()
    ended: list[str] = []

    def work(item: str) -> None:
        if item == "fails":
            failed.set()
            raise ValueError(item)
        assert failed.wait(timeout=20)
        ended.append(item)

    with pytest.raises(ValueError, match="fails"):
        map_in_threads(work, ["slow", "fails"], num_threads=2)
    assert ended == ["slow"]


def test_a_failure_in_the_background_is_raised_by_the_future() -> None:
    def fails() -> None:
        raise ValueError("behind")

    future = in_background(fails)
    with pytest.raises(ValueError, match="behind"):
        future.result()


def test_a_call_that_hangs_is_left_behind() -> None:
    release = threading.Event()
    with pytest.raises(DeadlineError, match=r"no answer within 0\.05 s"):
        call_with_deadline(release.wait, 0.05)
    release.set()


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_a_call_in_time_returns_its_result_or_raises_its_error(timeout: float | None) -> None:
    def fails() -> None:
        raise TimeoutError("its own")

    caller = threading.get_ident()
    assert call_with_deadline(lambda: threading.get_ident() == caller, timeout) == (timeout is None)
    with pytest.raises(TimeoutError, match="its own"):
        call_with_deadline(fails, timeout)


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
        # The request has a timeout of ten minutes.
        assert child.wait(timeout=60) == 130
    finally:
        child.kill()
        over.set()
        server.shutdown()
        server.server_close()
