"""What a checkpoint holds beside tensors, and its form: a run goes on from nothing else."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from uniapl.errors import UsageError
from uniapl.training.checkpoint.directory import STATE

Count = Annotated[int, Field(ge=0, lt=2**63)]
Ids = list[Annotated[int, Field(ge=0, lt=2**31)]]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StoppingForm(_Form):
    """Of :class:`uniapl.training.monitor.early_stopping.Stopping`."""

    best: float | None
    waited: Count
    reason: str | None


class AdversaryForm(_Form):
    """Of :class:`uniapl.discriminator.bradley_terry.AdversaryState`."""

    accuracy: float
    paused: bool
    expert_mean: float | None
    max_tokens: Count | None


class ComparisonForm(_Form):
    """Of :class:`uniapl.discriminator.bradley_terry.Comparison`."""

    prompt_ids: Ids
    demonstration_ids: Ids
    completions: list[Ids]


class MultiplierForm(_Form):
    """Of :class:`uniapl.functional.controllers.Multiplier`."""

    value: float
    average: float
    integral: float | None


class RolloutForm(_Form):
    """Of :class:`uniapl.types.Rollout`."""

    completion_ids: Ids
    sampling_logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    policy_version: Count


class AheadForm(_Form):
    """A prompt and its rollouts for the next step; see :class:`OneStepOffSampler`."""

    prompt_ids: Ids
    seed: Count
    temperature: float
    max_completion_length: Count
    rollouts: list[RolloutForm]


class StateForm(_Form):
    """Of state.json; `ahead` is there one step off, the three before it where the stage has an adversary."""

    step: Count
    num_tokens: Count
    bad_steps: dict[str, Count]
    token_limit: Count | None
    max_tokens: Count
    methods: list[str]
    seed: Count
    data_sha256: str
    prompts: Count
    demonstrations: Count
    kind: str
    stage: Count
    stage_step: Count
    stage_tokens: Count
    stopping: StoppingForm
    stop_rule: dict[str, Any]
    adversary: AdversaryForm | None = None
    replay: list[ComparisonForm] | None = None
    multiplier: MultiplierForm | None = None
    ahead: list[AheadForm] | None = None

    @model_validator(mode="after")
    def _stage_has_a_method(self) -> "StateForm":
        if self.stage >= len(self.methods):
            raise ValueError(f"stage {self.stage + 1} of {len(self.methods)}")
        return self


def read_state(path: Path) -> dict[str, Any]:
    """The state in a checkpoint.

    Raises:
        UsageError: It does not have the form in which it was written.
    """
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        return StateForm.model_validate(content).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError, RecursionError) as error:
        said = str(error)
    raise UsageError(
        f"checkpoint '{path}' cannot be used: its {STATE} is not as it was written ({said:.300}); name an "
        "older checkpoint by --resume, or start anew"
    )
