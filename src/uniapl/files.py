"""Writing whole files or none."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """All or nothing: a file that is there is whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
