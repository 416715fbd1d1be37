"""The wheel and the sdist: complete, reproducible, and usable without the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from support.documents import ROOT


def build(target: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(directory.iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def tracked(*folders: str) -> set[str]:
    """The files of the repository in some folders, or every file there outside of a repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return {str(p.relative_to(ROOT)) for p in paths if p.is_file() and "__pycache__" not in p.parts}


def test_the_wheel_has_every_file_of_the_package_and_the_recipes(wheel: Path) -> None:
    expected = {name.removeprefix("src/") for name in tracked("src/uniapl")}
    expected |= {f"uniapl/{name}" for name in tracked("recipes")}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith("METADATA"))
        text = archive.read(metadata).decode()
    assert found == expected
    assert "uniapl/py.typed" in found
    assert "License-Expression: Apache-2.0" in text


def test_builds_are_reproducible(wheel: Path, tmp_path: Path) -> None:
    assert build("wheel", tmp_path / "wheel").read_bytes() == wheel.read_bytes()
    first, second = (build("sdist", tmp_path / name).read_bytes() for name in ("first", "second"))
    assert first == second


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    archive = build("sdist", tmp_path / "sdist")
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "again")]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(next((tmp_path / "again").iterdir())) as other:
        assert {i.filename: i.CRC for i in one.infolist()} == {i.filename: i.CRC for i in other.infolist()}


def test_the_wheel_alone_has_recipes_and_first_files(wheel: Path, tmp_path: Path) -> None:
    """The command line runs from the unpacked wheel in an empty directory; `make test-wheel` installs it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    work = tmp_path / "work"
    work.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}

    def uniapl(*words: str) -> str:
        command = [sys.executable, "-m", "uniapl.cli", *words]
        return subprocess.run(
            command, cwd=work, env=environment, check=True, capture_output=True, text=True
        ).stdout

    assert "smollm2/recipe.yaml      SmolLM2-135M-Instruct learns to follow" in uniapl("recipes")
    uniapl("recipes", "-o", "recipes")
    copied = {str(path.relative_to(work)) for path in (work / "recipes").rglob("*") if path.is_file()}
    assert copied == tracked("recipes")
    uniapl("init", "tools")
    assert (work / "tools" / "rewards.py").read_text().count("MODEL") == 0
    assert "path: tools/train.jsonl" in (work / "tools" / "recipe.yaml").read_text()
