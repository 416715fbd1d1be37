"""Write files that come with the package where the user asks for them."""

from collections.abc import Mapping
from pathlib import Path

from uniapl.errors import UsageError
from uniapl.files import write_text


def write_new(directory: Path, texts: Mapping[Path, str]) -> None:
    """Write texts below a directory, and change no file that exists.

    Args:
        texts: Path, relative to `directory`, -> content.

    Raises:
        UsageError: A file exists with another content, or cannot be written; nothing was changed in the
            first case.
    """
    try:
        for path, text in texts.items():
            target = directory / path
            if target.exists() and (not target.is_file() or target.read_bytes() != text.encode()):
                raise UsageError(f"'{target}' already exists: choose another directory with -o")
        for path, text in texts.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            write_text(directory / path, text)
    except OSError as error:
        raise UsageError(f"'{directory}' cannot be written: {error}") from error
