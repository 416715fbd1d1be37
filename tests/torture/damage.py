"""Damaged checkpoints: named, never used, and the one before them leads to the same end."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from torture import children
from torture.differences import differences
from torture.setting import Setting, forget, log_of
from uniapl.training.checkpoint import directory as checkpoint

WAYS = ("flipped", "truncated", "deleted")


@dataclass(kw_only=True)
class Damage:
    """What was done to a finished run's files."""

    run: Path
    file: str
    way: str
    both: bool
    """To both checkpoints; otherwise to the newest alone."""
    complaints: list[str] = field(default_factory=list)


def cases(setting: Setting) -> Iterator[tuple[str, str, bool]]:
    """(file, way, to both checkpoints): every file in every way."""
    newest = checkpoint.checkpoints(setting.reference)[-1]
    names = sorted(str(file.relative_to(newest)) for file in newest.rglob("*") if file.is_file())
    yield from ((name, way, False) for name in names for way in WAYS)
    yield from ((name, way, True) for name, way in zip(("manifest.json", "state.json"), WAYS, strict=False))
    yield "model.safetensors", WAYS[2], True


def damage(setting: Setting, name: str, way: str, both: bool, seed: int) -> Damage:
    """Damage a copy of the reference in one way, and resume it."""
    rng = Random(seed)
    label = "both" if both else "newest"
    run = setting.directory / f"damage-{seed}-{label}-{way}-{name.replace('/', '-')}"
    found = Damage(run=run, file=name, way=way, both=both)
    shutil.copytree(setting.reference, run)
    existing = checkpoint.checkpoints(run)
    for path in existing if both else existing[-1:]:
        spoil(path / name, way, rng)
    code = children.run(setting.arguments(run), log_of(run))
    said = log_of(run).read_text()
    if "Traceback" in said:
        found.complaints.append("a traceback")
    if f"{existing[-1].name} is damaged and skipped: " not in said:
        found.complaints.append("does not say that the newest checkpoint is damaged")
    # A damaged manifest may well accuse another file than itself.
    if name != checkpoint.MANIFEST and f"{name}: " not in said:
        found.complaints.append(f"does not name {name}")
    if both:
        if code != 2 or "every checkpoint" not in said:
            found.complaints.append(f"exit code {code}, expected 2 and a message")
        if checkpoint.checkpoints(run) != existing:
            found.complaints.append("checkpoints were deleted")
    elif code:
        found.complaints.append(f"exit code {code}")
    else:
        found.complaints += differences(run, setting.reference)
    if not found.complaints:
        forget(run)
    return found


def flip_manifest(setting: Setting) -> tuple[int, list[str]]:
    """Flip a bit of every byte of a manifest in turn: (how many it took, what was not found out)."""
    path = setting.directory / "flipped"
    shutil.copytree(checkpoint.checkpoints(setting.reference)[-1], path)
    file = path / checkpoint.MANIFEST
    content = file.read_bytes()
    flips, complaints = 0, []
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        if _same_json(flipped, content):
            continue
        flips += 1
        file.write_bytes(flipped)
        if not checkpoint.defects(path):
            complaints.append(f"{checkpoint.MANIFEST}: byte {place} flipped, and not found out")
    shutil.rmtree(path)
    return flips, complaints


def spoil(file: Path, way: str, rng: Random) -> None:
    """Do to a file what happens to files."""
    content = bytearray(file.read_bytes())
    if way == "deleted":
        file.unlink()
    elif way == "truncated":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        flipped = content.copy()
        # A manifest with a tab for a blank still says the same: that is no damage.
        while flipped == content or (file.name == checkpoint.MANIFEST and _same_json(flipped, content)):
            flipped = content.copy()
            flipped[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        file.write_bytes(flipped)


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False
