"""Run every stage of the GPU check, each in its own process, and summarize the results.

    make gpu-check                                   on a GPU, at most 8 minutes
    python benchmarks/gpu/check.py --tiny            tiny models on the CPU, at most 2 minutes

Each stage writes its JSON file to the output directory as soon as it has a figure, so that an interrupted
check keeps what it has measured. The exit code is 1 if a stage failed or exceeded its time limit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
STAGES = {"equivalence": 90, "speed": 260, "resume": 60, "adapter": 90, "recipe": 120}
"""Stage -> its time limit on a GPU in seconds, in order of rising cost."""
TOTAL = 480
"""Time limit of the check in seconds."""


def environment(output: Path) -> dict[str, str]:
    """Environment of the stages: this checkout and the other benchmarks on the path, and no network."""
    site = output / "site"
    # `uniapl` reads its own version from its metadata, which a checkout that is not installed lacks.
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    metadata = site / f"uniapl-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: uniapl\nVersion: {version}\n")
    places = [ROOT / "src", ROOT / "benchmarks" / "trl", HERE, site]
    path = [*map(str, places), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def run_stage(stage: str, arguments: list[str], environ: dict[str, str], limit: float) -> str:
    """Run one stage; return "passed", or the reason why it did not pass."""
    command = [sys.executable, str(HERE / f"{stage}.py"), *arguments]
    try:
        code = subprocess.run(command, env=environ, cwd=ROOT, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    return "passed" if code == 0 else f"failed with exit code {code}"


def main() -> int:
    """Run the chosen stages one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check", help="result directory")
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=[*STAGES])
    parser.add_argument("--recipe", type=Path, help="recipe of the stage 'recipe'; without it, it is skipped")
    options = parser.parse_args()
    stages = [stage for stage in options.stages if stage != "recipe" or options.recipe]
    output = options.output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    environ = environment(output)
    arguments = ["--output", str(output), *(["--tiny"] if options.tiny else [])]
    if options.recipe:
        arguments += ["--recipe", str(options.recipe.resolve())]
    start, outcomes = time.monotonic(), dict[str, str]()
    for stage in stages:
        print(f"== {stage}", flush=True)
        began = time.monotonic()
        left = TOTAL - (began - start)
        outcomes[stage] = run_stage(stage, arguments, environ, max(1, min(STAGES[stage], left)))
        print(f"== {stage}: {outcomes[stage]}, {time.monotonic() - began:.0f} s", flush=True)
        (output / "summary.json").write_text(json.dumps(outcomes, indent=1) + "\n")
    print(f"{time.monotonic() - start:.0f} s; results: {output}")
    return int(any(outcome != "passed" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
