"""The child process of :mod:`uniapl.rewards.math_process`: one line of JSON per request and per result.

It is run as a file, so that it does not import the package. The first line of its output is null, or the
reason why math-verify cannot be imported.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
from typing import Any

MEMORY_LIMIT = 4 * 2**30
"""Address space in bytes; a power tower would otherwise fill the machine's memory."""


def compare(solution: str, completion: str | None) -> list[Any]:
    r"""The reward of TRL's `accuracy_reward`, and the parsed solution and answer as text.

    The solution may be LaTeX or plain, but the answer must be LaTeX, with \boxed{} first. The reward is None
    if the solution cannot be parsed. A completion of None parses only the solution.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    gold = parse(solution, parsing_timeout=None)  # None sets no limit, as in TRL
    if not gold:
        return [None, "[unparseable]", "[skipped]"]
    if completion is None:
        return [None, str(gold), "[skipped]"]
    answer = parse(
        completion,
        extraction_config=[
            LatexExtractionConfig(
                normalization_config=NormalizationConfig(units=True),
                boxed_match_priority=0,
                try_extract_without_anchor=False,
            )
        ],
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    equal = verify(gold, answer, timeout_seconds=None)
    return [float(equal), str(gold), str(answer) if answer else "[unparseable]"]


def main(seconds: float) -> None:
    """Answer requests until the input ends.

    Args:
        seconds: Processor time allowed for a request.
    """
    # What a library prints goes to stderr, not between the results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(result: Any) -> None:
        results.write(json.dumps(result) + "\n")
        results.flush()

    try:
        importlib.import_module("math_verify")
    except Exception as error:
        write(repr(error))
        return
    with contextlib.suppress(ImportError, OSError, ValueError):  # not available on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    write(None)
    for line in sys.stdin:
        # SIGPROF ends the process even inside one operation on huge integers, which an exception cannot.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            result = compare(*json.loads(line))
        except Exception as error:
            result = repr(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write(result)


if __name__ == "__main__":
    main(float(sys.argv[1]))
