"""Calls in daemon threads: a call that hangs is left behind and does not keep the program from exiting."""

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class DeadlineError(Exception):
    """A call did not finish in time; a TimeoutError, in contrast, comes from the call itself."""


def in_background(work: Callable[[], Result]) -> Future[Result]:
    """Start `work` in a daemon thread; its exception, if any, is raised by the future's `result()`.

    A ThreadPoolExecutor does not do: Python joins its threads at exit, also those that hang.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def call_with_deadline(work: Callable[[], Result], timeout: float | None) -> Result:
    """Return the result of `work`, or raise its exception.

    Args:
        work: A call without arguments.
        timeout: Seconds to wait for it; None runs it in the calling thread without a limit.

    Raises:
        DeadlineError: It is still running after `timeout` seconds. Its thread is left behind.
    """
    if timeout is None:
        return work()
    future = in_background(work)
    if not wait([future], timeout).done:
        raise DeadlineError(f"no answer within {timeout:g} s")
    return future.result()


def map_in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], *, num_threads: int
) -> list[Result]:
    """Return the result of `work` for each item, in the order of the items.

    After a failure no further item is started; the running ones are awaited and the failure is raised.
    After Ctrl-C nothing is awaited.
    """
    free, failed = threading.Semaphore(num_threads), threading.Event()
    futures: list[Future[Result]] = []

    def finish(future: Future[Result]) -> None:
        if future.exception() is not None:
            failed.set()
        free.release()

    for item in items:
        free.acquire()
        if failed.is_set():
            break
        futures.append(in_background(functools.partial(work, item)))
        futures[-1].add_done_callback(finish)
    wait(futures)
    return [future.result() for future in futures]
