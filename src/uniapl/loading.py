"""Loading what transformers knows from a directory or the Hub, with one clear error for all that fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from uniapl.errors import UsageError


def from_pretrained(load: Callable[..., Any], what: str, name: str, **arguments: Any) -> Any:
    """What `load`, a `from_pretrained` of transformers, returns.

    Args:
        what: What it is for, as the error calls it.
        name: A directory or a Hub id.

    Raises:
        UsageError: It cannot be loaded; whatever the reason, its name and what was said of it.
    """
    # A Hub id has one slash at most; asking the Hub for a path would only cost the user minutes of retries.
    if not Path(name).exists() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise UsageError(f"cannot load the {what} '{name}': there is no such directory")
    try:
        return load(name, **arguments)
    except Exception as error:  # transformers and the Hub client raise many kinds
        hint = "" if Path(name).exists() else " (there is no such directory here)"
        raise UsageError(f"cannot load the {what} '{name}'{hint}: {error}") from error
