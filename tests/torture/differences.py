"""What distinguishes two runs that should be one."""

from pathlib import Path

import yaml

from support.runs import lines, timeless
from uniapl.training.checkpoint import directory as checkpoint

LOGS = ("metrics.jsonl", "completions.jsonl", "health.jsonl")
# The page and how the run ended are written after it; they need not be there after a kill at the very end.
END_FILES = {"ending.json", "report.html", ".lock"}
TOP = {"config.yaml", "manifest.json", *LOGS, "checkpoints", "stages", "final"}


def differences(run: Path, reference: Path, *, moved: bool = False) -> list[str]:
    """Everything in which a finished run is not the reference; nothing when they are the same.

    Args:
        moved: Whether the last but one checkpoint may be of another step, by a save that a signal asked for.
            The reference then has to have one of every step.
    """
    there = {path.name for path in run.iterdir()}
    found = [f"{name}: should not be there" for name in sorted(there - TOP - END_FILES)]
    if found or (missing := sorted(TOP - there)):
        return found or [f"{name}: missing" for name in missing]
    ours, theirs = ({path.name for path in (side / "checkpoints").iterdir()} for side in (run, reference))
    right = len(ours) == 2 and max(ours) == max(theirs) if moved else ours == theirs
    if not right:
        found.append(f"checkpoints: {sorted(ours)}, the reference's are {sorted(theirs)}")
    for name in (*(f"checkpoints/{name}" for name in sorted(ours & theirs)), "stages", "final"):
        found += _in_files(run / name, reference / name, name)
    found += _in_lines(run, reference)
    ours, theirs = (yaml.safe_load((side / "config.yaml").read_text()) for side in (run, reference))
    own = {"output_dir", "save_steps", "save_total_limit"}
    found += [f"config.yaml: {k}" for k in ours | theirs if k not in own and ours.get(k) != theirs.get(k)]
    return found


def wrong_checkpoints(run: Path, every: Path) -> list[str]:
    """Checkpoints of an unfinished run that load but are not what an undisturbed run had at their step."""
    found: list[str] = []
    for path in whole_checkpoints(run):
        found += _in_files(path, every / "checkpoints" / path.name, f"checkpoints/{path.name}")
    return found


def whole_checkpoints(run: Path) -> list[Path]:
    """Those without a defect, oldest first."""
    return [path for path in checkpoint.checkpoints(run) if not checkpoint.defects(path)]


def _in_files(ours: Path, theirs: Path, title: str) -> list[str]:
    names = [{str(f.relative_to(side)) for f in side.rglob("*")} for side in (ours, theirs)]
    found = [f"{title}/{name}: in one of the two alone" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        mine, other = ours / name, theirs / name
        if mine.is_file() and mine.read_bytes() != other.read_bytes():
            found.append(f"{title}/{name}: other bytes")
    return found


def _in_lines(run: Path, reference: Path) -> list[str]:
    found: list[str] = []
    for name in LOGS:
        mine, other = (timeless(lines(side / name)) for side in (run, reference))
        if mine == other:
            continue
        pairs = zip(mine, other, strict=False)
        at = next((theirs["step"] for ours, theirs in pairs if ours != theirs), "the end")
        found.append(f"{name}: differs from step {at} on, {len(mine)} lines, expected {len(other)}")
    return found
