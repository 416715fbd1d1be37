"""Samplers from flat settings."""

from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel

from uniapl.rollout.local import LocalSampler
from uniapl.rollout.settings import SamplingSettings

NAMES = {field.name for field in fields(SamplingSettings)}


def local_sampler(model: PreTrainedModel, **settings: Any) -> LocalSampler:
    """A local sampler, whose settings are those of the sampler and of :class:`SamplingSettings`."""
    sampling = {name: value for name, value in settings.items() if name in NAMES}
    rest = {name: value for name, value in settings.items() if name not in NAMES}
    return LocalSampler(model=model, settings=SamplingSettings(**sampling), **rest)
