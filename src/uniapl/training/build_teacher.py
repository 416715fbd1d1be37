"""The teacher of a stage, and the checks before training that it fits the policy."""

from collections.abc import Sequence

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from uniapl.config import Config, ModelConfig
from uniapl.config.teacher import TeacherConfig
from uniapl.errors import UsageError
from uniapl.http import check_url
from uniapl.models.loading import (
    ModelSource,
    check_vocabulary_size,
    load_model,
    load_model_config,
    load_tokenizer,
)
from uniapl.models.policy import Policy
from uniapl.teacher import Teacher
from uniapl.teacher.local import LocalTeacher
from uniapl.teacher.server import TeacherServer
from uniapl.types import Example

NUM_PROBED_PROMPTS = 8


def build_teacher(config: Config, accelerator: Accelerator) -> Teacher | None:
    """The teacher of the configuration; None without `objective.teacher_kl`. Every process has its own."""
    settings = config.teacher
    if not config.objective.teacher_kl:
        return None
    if settings.url is not None:
        return _server(settings, settings.url)
    model = load_model(teacher_source(settings)).to(accelerator.device)
    if accelerator.mixed_precision == "bf16" and accelerator.device.type != "cpu":
        model = model.bfloat16()
    teacher = Policy(model, accelerator.autocast).requires_grad_(False)
    return LocalTeacher(model=teacher, top_k=settings.top_k, autocast=accelerator.autocast)


def check_teacher(config: Config, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> None:
    """Check before training that the teacher exists and has the policy's tokenizer.

    Args:
        examples: The prompts.

    Raises:
        UsageError: It does not.
    """
    settings, rollout = config.teacher, config.rollout
    if not config.objective.teacher_kl:
        return
    if settings.url is None:
        if settings.model_name_or_path is None:
            raise UsageError(
                "objective.teacher_kl needs a teacher: set teacher.model_name_or_path (a local model) or "
                "teacher.url (a vLLM server)"
            )
        _check_local(settings, tokenizer)
        return
    check_url("teacher.url", settings.url)
    if rollout.temperature != 1:
        raise UsageError(
            f"teacher.url: vLLM gives log-probabilities of prompts at temperature 1, but rollout.temperature "
            f"is {rollout.temperature:g}: set it to 1, or use a local teacher (teacher.model_name_or_path)"
        )
    longest = max((len(example.prompt_ids) for example in examples), default=0)
    texts = [str(tokenizer.decode(list(example.prompt_ids))) for example in examples[:NUM_PROBED_PROMPTS]]
    _server(settings, settings.url).check(tokenizer, texts, longest + rollout.max_completion_length)


def _check_local(settings: TeacherConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    source = teacher_source(settings)
    vocabulary, own = load_tokenizer(source).get_vocab(), tokenizer.get_vocab()
    if vocabulary != own:
        different = next(token for token in own | vocabulary if own.get(token) != vocabulary.get(token))
        raise UsageError(
            f"teacher.model_name_or_path: '{source.base}' has another tokenizer than the policy: "
            f"{different!r} has id {vocabulary.get(different)} there and {own.get(different)} here. A "
            "teacher needs the policy's tokenizer"
        )
    config = load_model_config(source).get_text_config()
    check_vocabulary_size(getattr(config, "vocab_size", len(tokenizer)), tokenizer)


def _server(settings: TeacherConfig, url: str) -> TeacherServer:
    return TeacherServer(
        url=url, top_k=settings.top_k, timeout=settings.timeout, max_retries=settings.max_retries
    )


def notes_on_teacher(stages: Sequence[Config]) -> list[str]:
    """A note if a teacher is configured that no stage uses."""
    if any(stage.objective.teacher_kl for stage in stages):
        return []
    named = [key for stage in stages for key in ("model_name_or_path", "url") if getattr(stage.teacher, key)]
    return [f"teacher.{key} has no effect: objective.teacher_kl is 0" for key in dict.fromkeys(named)]


def teacher_source(settings: TeacherConfig) -> ModelSource:
    """Where the local teacher is loaded from."""
    return ModelSource.resolve(
        ModelConfig(
            model_name_or_path=settings.model_name_or_path,
            model_revision=settings.model_revision,
            trust_remote_code=settings.trust_remote_code,
        )
    )
