"""Code blocks of the documents."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<turn>{% endif %}"
)


def block(document: str, beginning: str) -> str:
    return next(b for b in code_blocks(ROOT / document) if b.startswith(beginning))


def read_rows(text: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while text := text.strip():
        row, end = json.JSONDecoder().raw_decode(text)
        rows.append(row)
        text = text[end:]
    return rows
