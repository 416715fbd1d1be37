"""Rows written for the tests of `uniapl collect`."""

import json
from pathlib import Path
from typing import Any


def write(path: Path, prompts: list[Any], **columns: Any) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, **columns}) + "\n" for prompt in prompts))
    return path
