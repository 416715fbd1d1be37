from typing import Any

INSTRUCTION_DICT: dict[str, Any]
INSTRUCTION_CONFLICTS: dict[str, set[str]]
