"""Writing whole files or none, and reading the whole lines of one."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """All or nothing: a file that is there is whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def whole_lines(path: Path) -> list[str]:
    """Lines that end, of a file that need not be there; a killed process may have left half of one."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if line]
