"""Work in threads that the end of the program does not wait for: one that hangs is left behind."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_background(work: Callable[[], Result]) -> Future[Result]:
    """Begin `work`, and go on.

    Not by a ThreadPoolExecutor: Python waits for its threads before it ends.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised where the result is waited for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], *, at_once: int) -> list[Result]:
    """What `work` makes of each item, in their order.

    After a failure no item is begun, those under way are waited for, and it is raised. After Ctrl-C nothing
    is waited for.
    """
    left = deque(enumerate(items))
    results: dict[int, Result] = {}

    def run() -> None:
        while True:
            try:
                number, item = left.popleft()
            except IndexError:
                return
            try:
                results[number] = work(item)
            except BaseException:
                left.clear()
                raise

    try:
        workers = [in_background(run) for _ in range(min(at_once, len(items)))]
        failures = [worker.exception() for worker in workers]
    finally:
        left.clear()
    for failure in failures:
        if failure is not None:
            raise failure
    return [results[number] for number in range(len(items))]
