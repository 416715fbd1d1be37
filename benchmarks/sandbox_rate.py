"""Jobs per second of one worker in each sandbox available on this machine, and the start-up time of a worker.

    python benchmarks/sandbox_rate.py [--jobs 500]

A job is one verifier function in the style of AutoIF, applied to one text of a hundred words.
"""

import argparse
import time

from uniapl.errors import UsageError
from uniapl.rewards.sandbox import Job, Layers, Sandbox
from uniapl.rewards.sandbox.layers import WRAPPERS

SOURCE = """\
def evaluate(response):
    words = response.split()
    return sum(word.lower().startswith("b") for word in words) > len(words) / 4
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--jobs", type=int, default=500)
    options = parser.parse_args()
    for wrapper in WRAPPERS:
        start = time.monotonic()
        try:
            pool = Sandbox(workers=1, layers=Layers(wrapper=wrapper))
        except UsageError as error:
            print(f"{wrapper}: {error}")
            continue
        started = time.monotonic() - start
        jobs = [Job(SOURCE, f"{number} " + "a big brown bear " * 25) for number in range(options.jobs)]
        start = time.monotonic()
        verdicts = pool.run(jobs)
        seconds = time.monotonic() - start
        assert all(verdict is True for verdict in verdicts)
        pool.close()
        print(f"{', '.join(pool.layers)}: {options.jobs / seconds:.0f} jobs/s, start {started * 1000:.0f} ms")


if __name__ == "__main__":
    main()
