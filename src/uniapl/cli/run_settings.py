"""How the run that saved a model wrote its prompts, and where its completions ended."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniapl.config.resolve import load_recipe, resolve, stages_of

RUN_FILES = ("config.yaml", "manifest.json")
PROMPT_KEYS = ("system_prompt", "chat_template_kwargs")
TOOLS = ("tools", "environment", "max_tool_calling_iterations", "tool_timeout", "max_tool_result_length")
"""Keys of `rollout` that are the same in evaluation."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of a run that its saved models do not contain.

    They contain the chat template and the stop tokens.
    """

    file: Path
    """The run's config.yaml."""
    prompts: dict[str, Any]
    """Keys of `data`: `system_prompt`, `chat_template_kwargs`, and `prompt_format` if it is known: text if
    all prompts were plain text, else chat, also if the rows contained messages."""
    stop_strings: tuple[str, ...]
    """Where the run's evaluation stops, or else the rollouts of its last stage."""
    tools: dict[str, Any]
    """The keys `TOOLS` of the last stage; empty without tools."""


def settings_of_run(model: str) -> RunSettings | None:
    """The settings of the run that saved a model; None if the model is not in a run directory.

    Args:
        model: Directory or Hub id; a run keeps its models in final/ and checkpoints/step-NNNNNN/.

    Raises:
        UsageError: The run's config.yaml is not valid.
    """
    parents = Path(model).resolve().parents[:2]
    run = next((p for p in parents if all((p / name).is_file() for name in RUN_FILES)), None)
    if run is None:
        return None
    resolved = resolve(load_recipe(run / "config.yaml"), path=run / "config.yaml")
    config = resolved.config
    prompts = config.data.model_dump(include={*PROMPT_KEYS})
    if (found := _prompt_format(run / "manifest.json")) is not None:
        prompts["prompt_format"] = found
    rollout, strings = stages_of(resolved)[-1].config.rollout, config.evaluation.stop_strings
    return RunSettings(
        file=run / "config.yaml",
        prompts=prompts,
        stop_strings=rollout.stop_strings if strings is None else strings,
        tools=rollout.model_dump(include={*TOOLS}) if rollout.tools or rollout.environment else {},
    )


def _prompt_format(manifest: Path) -> str | None:
    """Whether a run was trained on plain text prompts only; None if that is not known."""
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))["data"]
        return "text" if 0 < data["examples"] == data["plain_text_prompts"] else "chat"
    except (OSError, ValueError, LookupError, TypeError):
        return None
