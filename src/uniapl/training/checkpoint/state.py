"""The JSON part of a checkpoint: its form, checked before a run resumes from it."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, create_model

from uniapl.discriminator.bradley_terry import AdversaryState, Comparison
from uniapl.errors import UsageError
from uniapl.functional import Multiplier
from uniapl.report.adversary import AdversaryEffect
from uniapl.training.checkpoint.directory import STATE
from uniapl.training.monitor.early_stopping import Stopping
from uniapl.types import Rollout, TokenIds

Count = Annotated[int, Field(ge=0, lt=2**63)]
WeightedCount = Annotated[float, Field(ge=0, lt=2**20)]
"""Rollouts of a prompt, of which earlier ones count less: at most twice `num_generations`."""


AHEAD: dict[str, Any] = {
    "prompt_ids": TokenIds,
    "seed": Count,
    "rollouts": list[Rollout],
    # Checkpoints of earlier versions have none, so that their rollouts are sampled again.
    "settings": (dict[str, Any], {}),
}
"""The rollouts of one prompt that were sampled one step ahead."""
FIELDS: dict[str, Any] = {
    **dict.fromkeys(("step", "num_tokens", "max_tokens", "stage", "stage_step", "stage_tokens"), Count),
    **dict.fromkeys(("seed", "prompts", "demonstrations"), Count),
    "bad_steps": dict[str, Count],
    "token_limit": Annotated[int | None, Field(ge=0, lt=2**63)],
    "methods": list[str],
    "data_sha256": str,
    "kind": str,
    "stopping": Stopping,
    "stop_rule": dict[str, Any],
}
OPTIONAL: dict[str, Any] = {
    "adversary": (AdversaryState, None),
    "replay": (list[Comparison], None),
    "multiplier": (Multiplier, None),
    "adversary_effect": (AdversaryEffect, None),
    "ahead": (list[create_model("Ahead", **AHEAD)], None),
    "stage_rollouts": (Count, 0),
    "pass_rates": (dict[str, tuple[WeightedCount, WeightedCount]], {}),
}
State = create_model("State", **FIELDS, **OPTIONAL)


def read_state(path: Path) -> dict[str, Any]:
    """The state in a checkpoint.

    Raises:
        UsageError: The file cannot be read, or it does not have the form in which it was written.
    """
    try:
        text = (path / STATE).read_text(encoding="utf-8")
        State.model_validate_json(text, strict=True)
        state = json.loads(text, parse_int=_count, parse_float=_finite, parse_constant=_finite)
        if state["stage"] < len(state["methods"]):
            return state
        reason = f"stage {state['stage'] + 1} of {len(state['methods'])}"
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    except (OSError, ValueError) as error:
        reason = str(error)
    raise UsageError(
        f"checkpoint '{path}' cannot be used: its {STATE} is invalid ({reason:.300}); give an older "
        "checkpoint as --resume, or start a new run"
    )


def _count(number: str) -> int:
    """Every integer of the state is a count, a seed or a token id."""
    if not 0 <= int(number) < 2**63:
        raise ValueError(f"{number:.40} is not between 0 and 2**63")
    return int(number)


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"{number:.40} is not a finite number")
    return float(number)
