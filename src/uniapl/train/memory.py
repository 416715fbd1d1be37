"""How much memory a run will take, found out without taking it: its work on tensors that hold no data."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, AutoModelForCausalLM

from uniapl.batching import by_length
from uniapl.config import Config, ModelConfig
from uniapl.functional import selected_logprobs
from uniapl.loading import load_model_config
from uniapl.rollout.fused import FusedDecoder, Weights, fits
from uniapl.rollout.local import inverse_cdf, relative_probs, truncate
from uniapl.train.setup import Materials
from uniapl.train.storage import size

MOMENTS = 2
"""Of AdamW, each as large as the weights that it moves."""
CPU_SLACK = 0.15
"""Share by which a CPU's allocator takes more than is asked of it. Our measurement (docs/log.md)."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes at a stage's peak: what stays all the time, and the largest of what comes and goes."""

    device: str
    available: int
    """Of the device, now."""
    stays: dict[str, int]
    passes: dict[str, int]
    """Phase -> what it takes on top while it goes on."""

    @property
    def peak(self) -> int:
        """In the phase that takes most."""
        slack = CPU_SLACK if self.device == "cpu" else 0.0
        return sum(self.stays.values()) + round((1 + slack) * max(self.passes.values()))

    def __str__(self) -> str:
        phase = max(self.passes, key=lambda name: self.passes[name])
        stays, passes = (
            ", ".join(f"{name} {size(count)}" for name, count in parts.items())
            for parts in (self.stays, self.passes)
        )
        warning = "warning: " if self.peak > self.available else ""
        return (
            f"{warning}about {size(self.peak)} on the {self.device} at its peak ({phase}), if every answer "
            f"is as long as it may be; {size(self.available)} are free. "
            f"All the time: {stays}; on top of it, one after the other: {passes}"
        )


class Counter(TorchDispatchMode):
    """Counts the bytes of the storages that are made in it, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += count
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, count)

    def _forget(self, key: int, count: int) -> None:
        self.live -= count
        self._seen.discard(key)

    def taken_by(self, compute: Callable[[], None]) -> int:
        """The most bytes that `compute` takes beyond those there are."""
        before = self.peak = self.live
        compute()
        return self.peak - before


def estimate_memory(config: Config, materials: Materials, device: torch.device) -> MemoryEstimate:
    """The peak of a stage on one process, every answer as long as it may be.

    Args:
        config: Of the stage.
        device: Where it will train; on a CPU what the process itself takes, with the data, is counted too.
    """
    objective, settings = config.objective, config.discriminator
    bf16 = device.type == "cuda" if config.optim.bf16 is None else config.optim.bf16
    stays: dict[str, int] = {}
    if device.type == "cpu":
        stays["process"] = psutil.Process().memory_info().rss
    passes: dict[str, int] = {}
    counter = Counter()
    with FakeTensorMode(allow_non_fake_inputs=True), counter, torch.device(device):
        model = _model(AutoModelForCausalLM, config.model)
        weights = counter.live
        stays |= {"policy": weights, "optimizer": MOMENTS * weights}
        if objective.beta > 0:
            stays["reference"] = weights
        optimizer = torch.optim.AdamW(model.parameters())
        shape = _update_shape(config, materials)

        def update(*, learning: bool = True) -> None:
            for parameter in model.parameters():
                # From the second micro-batch on there are gradients to add to.
                parameter.grad = torch.zeros_like(parameter)
            if learning:
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    _learn(model, shape, reads_twice=objective.beta > 0)
            optimizer.step()
            optimizer.zero_grad()

        # The first step makes the moments.
        update(learning=False)
        passes["update"] = counter.taken_by(update)
        if objective.uses_rollouts:
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                passes["rollout"] = _rollout(counter, model, config, materials)
        if objective.lambda_adv > 0 and settings.kind != "remote":
            own = settings.model_name_or_path
            before = counter.live
            trunk = model.base_model
            if own is not None:
                trunk = _model(AutoModel, ModelConfig(model_name_or_path=own))
            bytes_of_it = sum(p.nbytes for p in trunk.parameters()) if own is None else counter.live - before
            trained = settings.kind == "bradley-terry" and settings.lora_rank is None
            if trained or own is not None:
                stays["discriminator"] = bytes_of_it * (1 + MOMENTS * trained)
            if settings.kind == "bradley-terry":
                limit = config.batching.max_tokens
                rows = config.batching.prompts_per_step * (config.rollout.num_generations + 1)
                width = shape[1]
                compared = (max(2, min(rows, limit // width)), width)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    passes["discriminator"] = counter.taken_by(lambda: _discriminate(trunk, compared))
    return MemoryEstimate(device=device.type, available=_available(device), stays=stays, passes=passes)


def _model(load: Any, config: ModelConfig) -> Any:
    described = load_model_config(config)
    optional = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    return load.from_config(
        described, dtype=torch.float32, trust_remote_code=config.trust_remote_code, **optional
    ).eval()


def _longest_prompt(materials: Materials) -> int:
    return max(len(example.prompt_ids) for example in materials.dataset.examples)


def _update_shape(config: Config, materials: Materials) -> tuple[int, int]:
    """(rows, padded tokens of each) of the largest micro-batch."""
    objective, batching = config.objective, config.batching
    prompt = _longest_prompt(materials)
    lengths: list[int] = []
    if objective.uses_rollouts:
        rollouts = batching.prompts_per_step * config.rollout.num_generations
        lengths += [prompt + config.rollout.max_completion_length] * rollouts
    if objective.learns_from_demonstrations:
        demonstrated = [
            len(e.prompt_ids) + len(e.demonstration_ids)
            for e in materials.dataset.examples
            if e.demonstration_ids is not None
        ]
        lengths += [max(demonstrated)] * batching.demonstrations_per_step
    parts = by_length(lengths, max_tokens=batching.max_tokens, max_rows=batching.per_device_train_batch_size)
    return max(((len(part), lengths[part[0]]) for part in parts), key=lambda shape: shape[0] * shape[1])


def _inputs(rows: int, width: int) -> dict[str, Tensor]:
    ids = torch.zeros(rows, width, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _learn(model: Any, shape: tuple[int, int], *, reads_twice: bool) -> None:
    """Forward and backward pass of a micro-batch as the policy does them."""
    inputs = _inputs(*shape)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    head = model.get_output_embeddings()
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        temperature = torch.ones(len(hidden))
        logprobs, _ = selected_logprobs(
            hidden, head.weight, inputs["input_ids"].flatten(), temperature, bias=head.bias
        )
    if reads_twice:
        with torch.no_grad():
            model.base_model(**inputs, use_cache=False)
    logprobs.sum().backward()


def _discriminate(trunk: nn.Module, shape: tuple[int, int]) -> None:
    trunk(**_inputs(*shape), use_cache=False).last_hidden_state[:, -1].float().sum().backward()
    trunk.zero_grad()


def _rollout(counter: Counter, model: Any, config: Config, materials: Materials) -> int:
    """What reading the prompts takes, and one more token for every row at its full length."""
    settings = config.rollout
    prompts = min(config.batching.prompts_per_step, max(1, settings.max_rows // settings.num_generations))
    prompt = _longest_prompt(materials)

    def choose(logits: Tensor) -> None:
        probs = relative_probs(logits, temperature=settings.temperature)
        inverse_cdf(truncate(probs, top_p=settings.top_p, top_k=settings.top_k), torch.zeros(len(probs)))

    def fused() -> None:
        decoder = FusedDecoder(
            Weights(model),
            [(0,) * prompt] * prompts,
            settings.num_generations,
            settings.max_completion_length,
        )
        logits = decoder.prefill()
        decoder.length = len(decoder.columns) - 1
        choose(decoder.step(logits.argmax(-1)))

    def read() -> None:
        model(**_inputs(prompts, prompt), use_cache=True, logits_to_keep=1)

    def decode() -> None:
        rows, width = prompts * settings.num_generations, prompt + settings.max_completion_length
        cache = model(**_inputs(rows, 1), use_cache=True, logits_to_keep=1).past_key_values
        for layer in cache.layers:
            layer.keys = layer.keys.new_empty(*layer.keys.shape[:2], width - 1, layer.keys.shape[-1])
            layer.values = layer.values.new_empty(*layer.values.shape[:2], width - 1, layer.values.shape[-1])
        inputs: dict[str, Tensor] = {
            "input_ids": torch.zeros(rows, 1, dtype=torch.int64),
            "attention_mask": torch.ones(rows, width, dtype=torch.int64),
        }
        choose(model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1].float())

    if settings.decoding == "fused" and fits(model):
        return counter.taken_by(fused)
    return max(counter.taken_by(read), counter.taken_by(decode))


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
