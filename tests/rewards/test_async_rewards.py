"""Async reward functions: one event loop for all calls of a process."""

import asyncio
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from support.runs import lines, recipe, train
from uniapl.errors import UsageError
from uniapl.rewards import Rewarder
from uniapl.rewards.base import NamedReward, named_reward
from uniapl.rewards.finding import find_function
from uniapl.types import Example

TEXTS = ("a", "bb", "ccc")
EXAMPLES = [
    Example(row=n, prompt="p", prompt_ids=(5,), demonstration=None, demonstration_ids=None, columns={})
    for n in range(1, 4)
]


def score(*rewards: NamedReward, timeout: float | None = 30.0) -> dict[str, Any]:
    return Rewarder(rewards, timeout=timeout).score(EXAMPLES, TEXTS, [(1,)] * 3)


async def letters(completions: list[str], *, factor: float = 1.0) -> list[float]:
    await asyncio.sleep(0)
    return [factor * len(c) for c in completions]


class Letters:
    async def __call__(self, completions: list[str]) -> list[float]:
        return await letters(completions)


def wrapped(function: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    """A decorator that is not async itself."""

    @functools.wraps(function)
    def call(**kwargs: Any) -> Any:
        return function(completions=kwargs["completions"])

    return call


@pytest.mark.parametrize("timeout", [30.0, None])
@pytest.mark.parametrize(
    "function",
    [letters, functools.partial(letters, factor=1.0), Letters(), Letters().__call__, wrapped(letters)],
)
def test_every_form_of_an_async_function_is_awaited(
    function: Callable[..., Any], timeout: float | None
) -> None:
    assert score(named_reward("f", function), timeout=timeout)["f"].values == [1.0, 2.0, 3.0]


@pytest.mark.case(10)
def test_a_semaphore_of_the_module_works_in_every_call(tmp_path: Path) -> None:
    (tmp_path / "limited.py").write_text(
        "import asyncio\n"
        "limit, running, most = asyncio.Semaphore(2), 0, 0\n"
        "async def one(text):\n"
        "    global running, most\n"
        "    async with limit:\n"
        "        running += 1\n"
        "        most = max(most, running)\n"
        "        await asyncio.sleep(0)\n"
        "        running -= 1\n"
        "    return float(len(text))\n"
        "async def f(completions):\n"
        "    return await asyncio.gather(*map(one, completions))\n"
    )
    function = find_function(f"{tmp_path / 'limited.py'}:f")
    for _ in range(3):  # three Rewarders, as the trial call, the run and its evaluation may have
        outcome = score(named_reward("f", function))["f"]
        assert (outcome.values, outcome.message) == ([1.0, 2.0, 3.0], None)
    assert function.__globals__["most"] == 2  # type: ignore[attr-defined]


@pytest.fixture
def judge() -> Any:
    """A server that answers with the length of the text, over connections that stay open."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
            body = json.dumps({"score": len(text)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


JUDGED = """
import asyncio, httpx
client = httpx.AsyncClient()
async def one(text):
    answer = await client.post(URL, json={"text": text})
    return answer.json()["score"]
async def judged(completions):
    return await asyncio.gather(*map(one, completions))
"""


@pytest.mark.case(10)
def test_a_client_of_the_module_works_for_a_whole_run_and_its_evaluation(
    judge: str, model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "judged.py").write_text(f"URL = {judge!r}\n{JUDGED}")
    data = tmp_path / "held_out.jsonl"
    data.write_text('{"prompt": "say a"}\n{"prompt": "say b"}\n')
    values = recipe(
        model_dir,
        tmp_path / "run",
        method="grpo",
        rewards={"functions": (name := f"{tmp_path / 'judged.py'}:judged")},
        evaluation={"suites": [str(data)], "max_completion_length": 4},
        eval_steps=2,
    )
    train(values, reward_functions=[])
    for record in lines(tmp_path / "run" / "metrics.jsonl"):
        assert record[f"rewards/{name}/error_rate"] == record[f"rewards/{name}/timeout_rate"] == 0
    for group in lines(tmp_path / "run" / "completions.jsonl"):
        assert [c["reward"] for c in group["completions"]] == [len(c["text"]) for c in group["completions"]]
    evaluated = [r for r in lines(tmp_path / "run" / "metrics.jsonl") if "eval/held_out/reward" in r]
    assert [r["step"] for r in evaluated] == [2, 4]
    assert all(r["eval/held_out/unscored"] == 0 for r in evaluated)


def test_async_functions_run_at_the_same_time() -> None:
    """Each of the two waits for the other, and both for a function that is not async."""
    here, there = asyncio.Event(), asyncio.Event()
    done = threading.Event()

    async def first(completions: list[str]) -> list[float]:
        here.set()
        await there.wait()
        await asyncio.to_thread(done.wait)
        return [1.0] * 3

    async def second(completions: list[str]) -> list[float]:
        there.set()
        await here.wait()
        return [2.0] * 3

    def last(completions: list[str]) -> list[float]:
        done.set()
        return [3.0] * 3

    rewards = [named_reward(f.__name__, f) for f in (first, second, last)]
    outcomes = score(*rewards, timeout=20.0)
    assert {name: outcome.values for name, outcome in outcomes.items()} == {
        "first": [1.0] * 3,
        "second": [2.0] * 3,
        "last": [3.0] * 3,
    }
    assert list(outcomes) == ["first", "second", "last"]


def test_a_time_out_cancels_the_task_and_leaves_the_loop_to_the_others() -> None:
    cancelled = threading.Event()
    limit = asyncio.Semaphore(1)

    async def slow(completions: list[str]) -> list[float]:
        async with limit:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                cancelled.set()
                raise
        return [1.0] * 3

    async def quick(completions: list[str]) -> list[float]:
        return [2.0] * 3

    outcomes = score(named_reward("slow", slow), named_reward("quick", quick), timeout=0.2)
    assert outcomes["slow"].timed_out == [True] * 3
    assert outcomes["slow"].message == "timed out after 0.2 s"
    assert outcomes["quick"].values == [2.0] * 3
    assert cancelled.is_set()
    assert not limit.locked()


def test_a_time_out_of_the_function_itself_is_an_error() -> None:
    async def impatient(completions: list[str]) -> list[float]:
        await asyncio.wait_for(asyncio.sleep(600), 0.01)
        return [1.0] * 3

    outcome = score(named_reward("f", impatient))["f"]
    assert (outcome.failed, outcome.timed_out) == ([True] * 3, [False] * 3)


def test_a_function_that_blocks_the_loop_costs_only_its_step() -> None:
    async def blocks(completions: list[str]) -> list[float]:
        time.sleep(4)
        return [1.0] * 3

    outcome = score(named_reward("f", blocks), timeout=0.2)["f"]
    assert outcome.timed_out == [True] * 3
    assert "blocked the event loop" in (outcome.message or "")
    assert score(named_reward("g", letters))["g"].values == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit])
@pytest.mark.parametrize("nested", [False, True])
def test_no_exception_ends_the_loop(error: type[BaseException], nested: bool) -> None:
    async def fails() -> None:
        raise error

    async def f(completions: list[str]) -> list[float]:
        await (asyncio.create_task(fails()) if nested else fails())
        return [1.0] * 3

    for timeout in (30.0, None):
        outcome = score(named_reward("f", f), timeout=timeout)["f"]
        assert (outcome.failed, outcome.timed_out) == ([True] * 3, [False] * 3)
        assert error.__name__ in (outcome.message or "")
        assert score(named_reward("g", letters), timeout=timeout)["g"].values == [1.0, 2.0, 3.0]


def test_one_bad_completion_of_an_async_function_costs_only_its_own_reward() -> None:
    async def f(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        if "bb" in completions:
            raise ZeroDivisionError("no bb")
        return [1.0] * len(completions)

    outcome = score(named_reward("f", f))["f"]
    assert outcome.values == [1.0, None, 1.0]
    assert (outcome.message or "").startswith("ZeroDivisionError: no bb (test_async_rewards.py, line ")


def test_async_generators_are_refused() -> None:
    async def f(completions: list[str]) -> Any:
        for _ in completions:
            yield 1.0

    class Yields:
        async def __call__(self, completions: list[str]) -> Any:
            yield 1.0

    for function in (f, functools.partial(f), Yields()):
        with pytest.raises(
            UsageError, match="'f' is an async generator: return a list instead of using `yield`"
        ):
            named_reward("f", function)


LEAVES = """
import asyncio, os, sys, time
from uniapl.rewards import Rewarder
from uniapl.rewards.base import named_reward
from uniapl.types import Example
rows = [Example(row=1, prompt="p", prompt_ids=(5,), demonstration=None, demonstration_ids=None, columns={})]
limit = asyncio.Semaphore(1)
async def one():
    async with limit:
        await asyncio.sleep(0)
async def f(completions):
    await asyncio.gather(one(), one())
    return [1.0]
async def forever(completions):
    try:
        await asyncio.sleep(600)
    finally:
        print("cleaned up", flush=True)
async def stuck(completions):
    await asyncio.to_thread(time.sleep, 600)
def score(function, timeout=30.0):
    return Rewarder([named_reward("f", function)], timeout=timeout).score(rows, ["a"], [(1,)])["f"].values
"""


def run_script(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", "-c", LEAVES + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)


def test_a_forked_process_has_its_own_loop() -> None:
    done = run_script(
        "assert score(f) == [1.0]\n"
        "limit = asyncio.Semaphore(1)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os._exit(0 if score(f) == [1.0] else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "assert score(f) == [1.0]\n"
    )
    assert done.returncode == 0, done.stderr


def test_the_process_ends_cleanly_while_calls_are_running() -> None:
    """Ctrl-C leaves a call behind; the exit cancels it, and a thread that hangs does not delay the exit."""
    begin = time.monotonic()
    done = run_script(
        # A background job of a shell ignores SIGINT.
        "import signal, threading\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "assert score(stuck, timeout=0.1) == [None]\n"
        "main = threading.main_thread().ident\n"
        "threading.Timer(1.0, signal.pthread_kill, [main, signal.SIGINT]).start()\n"
        "try:\n"
        "    score(forever, timeout=None)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True)\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\ncleaned up\n", "")
    assert time.monotonic() - begin < 50
