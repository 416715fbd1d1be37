"""Many requests, some at a time."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from uniapl.collect.cache import Answer
from uniapl.collect.client import Client, Endpoint, GivenUpError
from uniapl.errors import UniAPLError, UsageError

MOST_IN_A_ROW = 8
"""Requests that are given up, with no answer between them, before all are. Our choice."""


def only_model(endpoint: Endpoint) -> str:
    """The model that a server has.

    Raises:
        UsageError: It has several, or none.
        UniAPLError: It does not say.
    """

    async def ask() -> list[str]:
        async with Client(endpoint, concurrency=1) as client:
            return await client.models()

    try:
        models = asyncio.run(ask())
    except GivenUpError as error:
        raise _stop(endpoint, error, "--model would name the model without asking") from None
    if len(models) != 1:
        listed = ", ".join(models) or "none"
        raise UsageError(f"{endpoint.shown} has {len(models)} models ({listed:.1000}): choose by --model")
    return models[0]


async def ask_all(
    bodies: Mapping[str, dict[str, Any]],
    endpoint: Endpoint,
    *,
    concurrency: int,
    keep: Callable[[str, Answer], None],
    failed: Callable[[str, str], None],
) -> None:
    """Ask for every answer, at most `concurrency` at the same time; each goes to `keep` as it comes in.

    Args:
        bodies: Requests by their keys.
        keep: Is told the key and the answer.
        failed: Is told the key, and why there is no answer.

    Raises:
        UniAPLError: The endpoint cannot be reached, or answers nothing any more.
        UsageError: It refuses what it is asked.
    """
    waiting = iter(bodies.items())
    in_a_row = 0

    async def work(client: Client) -> None:
        nonlocal in_a_row
        for key, body in waiting:
            try:
                answer = await client.ask(body)
            except GivenUpError as error:
                in_a_row += 1
                failed(key, str(error))
                if error.for_all or in_a_row >= MOST_IN_A_ROW:
                    remedy = "Answers so far are kept: the same command goes on"
                    raise _stop(endpoint, error, remedy) from None
            else:
                in_a_row = 0
                keep(key, answer)

    async with Client(endpoint, concurrency=concurrency) as client:
        workers = [asyncio.create_task(work(client)) for _ in range(min(concurrency, len(bodies)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


def _stop(endpoint: Endpoint, error: GivenUpError, remedy: str) -> UniAPLError:
    kind = UsageError if error.refused else UniAPLError
    return kind(f"{endpoint.shown}: {error}. {remedy}")
