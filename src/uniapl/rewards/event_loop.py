"""The event loop of async reward functions: one per process, in its own thread.

Clients, semaphores and locks of a module belong to the loop that first used them, so every call of every
reward function runs in the same one.
"""

import asyncio
import atexit
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from uniapl.threads import in_background

GRACE = 1.0
"""Seconds that a cancelled function has to clean up, and that the loop has to respond. Our choice."""


class RewardTimeoutError(Exception):
    """A call exceeded its time limit. (A TimeoutError may be the function's own, for one sample.)"""


class LoopThread:
    """An event loop that runs in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(_DaemonExecutor())
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="uniapl-reward-loop", daemon=True)
        self._thread.start()

    def result_of(self, awaitable: Awaitable[Any], timeout: float | None) -> Any:
        """Await something in the loop, from another thread.

        Args:
            timeout: Seconds after which the task is cancelled; None sets no limit.

        Raises:
            RewardTimeoutError: It did not finish in time. If it ignores its cancellation, its task is left
                behind; if it blocks the loop, the next call gets a new loop.
        """
        future = asyncio.run_coroutine_threadsafe(_limited(awaitable, timeout), self._loop)
        try:
            done = wait([future], None if timeout is None else timeout + GRACE).done
        except BaseException:  # Ctrl-C
            future.cancel()
            raise
        if future.cancelled() and self._closing:
            # Unlike an error of the function, a time-out is not followed by further calls.
            raise RewardTimeoutError("cancelled because its event loop was closed")
        if done:
            return future.result()
        if self._responds():
            raise RewardTimeoutError(f"timed out after {timeout} s and ignored its cancellation")
        _forget(self)
        self.close(timeout=0)
        raise RewardTimeoutError(
            f"timed out after {timeout} s because an async reward function blocked the event loop: use "
            "`await`, or `await asyncio.to_thread(...)` for calls that block"
        )

    def close(self, timeout: float) -> None:
        """Cancel all tasks and end the thread; wait for it at most `timeout` seconds."""
        self._closing = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout)

    def _responds(self) -> bool:
        answered = threading.Event()
        self._loop.call_soon_threadsafe(answered.set)
        return answered.wait(GRACE)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self._closing:
            try:
                self._loop.run_forever()
            except (SystemExit, KeyboardInterrupt):  # raised by a task that a reward function started
                continue
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


class _DaemonExecutor(ThreadPoolExecutor):
    """Runs `asyncio.to_thread` in daemon threads: a call that hangs does not keep the process alive."""

    def __init__(self) -> None:
        super().__init__()
        self._slots = threading.Semaphore(self._max_workers)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def work() -> Any:
            with self._slots:
                return fn(*args, **kwargs)

        return in_background(work)


_current: LoopThread | None = None
_lock = threading.Lock()


def loop_thread() -> LoopThread:
    """The process's event loop, which the first call starts."""
    global _current
    with _lock:
        if _current is None:
            _current = LoopThread()
        return _current


def _forget(thread: LoopThread | None) -> None:
    global _current
    with _lock:
        if _current is thread:
            _current = None


def _close_at_exit() -> None:
    if _current is not None:
        _current.close(timeout=GRACE)


def _after_fork() -> None:
    """A forked process has no copy of the thread, and the lock may have been held."""
    global _current, _lock
    _current, _lock = None, threading.Lock()


atexit.register(_close_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


async def _limited(awaitable: Awaitable[Any], timeout: float | None) -> Any:
    scope = asyncio.timeout(timeout)
    try:
        async with scope:
            return await awaitable
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        if scope.expired():
            raise RewardTimeoutError(f"timed out after {timeout} s") from None
        if isinstance(error, Exception):
            raise
        # SystemExit and KeyboardInterrupt would end the loop.
        raise RuntimeError(repr(error)) from error
