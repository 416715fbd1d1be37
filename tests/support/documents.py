"""Code blocks of the documents."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<turn>{% endif %}"
)


def code_blocks(document: Path) -> list[str]:
    """The indented blocks of a Markdown file, without their indentation."""
    blocks: list[list[str]] = [[]]
    for line in document.read_text().splitlines():
        if line.startswith("    "):
            blocks[-1].append(line[4:])
        elif not line.strip() and blocks[-1]:
            blocks[-1].append("")
        elif blocks[-1]:
            blocks.append([])
    return ["\n".join(block).strip() + "\n" for block in blocks if block]


def block(document: str, beginning: str) -> str:
    return next(b for b in code_blocks(ROOT / document) if b.startswith(beginning))


def read_rows(text: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while text := text.strip():
        row, end = json.JSONDecoder().raw_decode(text)
        rows.append(row)
        text = text[end:]
    return rows
