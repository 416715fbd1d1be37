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

from uniapl.config import BatchingConfig, Config, ModelConfig
from uniapl.data.batching import Row, by_length, by_prompt, collate
from uniapl.functional import selected_logprobs
from uniapl.models.loading import load_model_config
from uniapl.models.lora import add_adapter
from uniapl.models.packing import NAME, Packing, packed_hidden
from uniapl.rollout.fused import FusedDecoder, Weights, supports_fused
from uniapl.rollout.local import inverse_cdf, relative_probs, truncate
from uniapl.training.checkpoint.disk import format_bytes
from uniapl.training.inputs import RunInputs
from uniapl.training.update.activation_checkpointing import recomputed

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
            ", ".join(f"{name} {format_bytes(count)}" for name, count in parts.items())
            for parts in (self.stays, self.passes)
        )
        warning = "warning: " if self.peak > self.available else ""
        return (
            f"{warning}about {format_bytes(self.peak)} on the {self.device} at its peak ({phase}), if every "
            f"completion is as long as it may be; {format_bytes(self.available)} are free. "
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


def estimate_memory(config: Config, inputs: RunInputs, device: torch.device) -> MemoryEstimate:
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
    largest, compared = _readings(config, inputs)
    counter = Counter()
    model, trunk = _models(config)
    with FakeTensorMode(allow_non_fake_inputs=True), counter, torch.device(device):
        _take_memory(model, device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        changing = sum(parameter.nbytes for parameter in trained)
        stays |= {"policy": counter.live, "optimizer": MOMENTS * changing}
        if objective.beta > 0:
            stays["reference"] = changing
        optimizer = torch.optim.AdamW(trained)

        def update(*, learning: bool = True) -> None:
            for parameter in trained:
                # From the second micro-batch on there are gradients to add to.
                parameter.grad = torch.zeros_like(parameter)
            if learning:
                again = recomputed(model, config.optim.gradient_checkpointing)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16), again:
                    _learn(model, largest, reads_twice=objective.beta > 0)
            optimizer.step()
            optimizer.zero_grad()

        # The first step makes the moments.
        update(learning=False)
        passes["update"] = counter.taken_by(update)
        if objective.uses_rollouts and config.rollout.sampler == "vllm":
            if config.rollout.vllm_mode == "colocate":
                stays["vllm"] = round(config.rollout.vllm_gpu_memory_utilization * _available(device))
            # On the CPU, wherever it trains: a copy with the adapter merged, and one in another type.
            copies = (config.model.lora_r is not None) + bf16 / 2
            if device.type == "cpu" and copies:
                whole = sum(p.nbytes for name, p in model.named_parameters() if ".lora_" not in name)
                passes["weights for vLLM"] = round(copies * whole)
        elif objective.uses_rollouts:
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                passes["rollout"] = _rollout(counter, model, config, inputs)
        if objective.lambda_adv > 0 and settings.kind != "remote":
            if trunk is not model.base_model:
                _take_memory(trunk, device)
            learns = settings.kind == "bradley-terry" and settings.lora_r is None
            if learns or trunk is not model.base_model:
                # The policy's adapter is merged into a copy of it.
                weights = sum(p.nbytes for name, p in trunk.named_parameters() if ".lora_" not in name)
                stays["discriminator"] = weights * (1 + MOMENTS * learns)
                trunk.requires_grad_(True)
            if settings.kind == "bradley-terry":
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    passes["discriminator"] = counter.taken_by(lambda: _discriminate(trunk, compared))
    return MemoryEstimate(device=device.type, available=_available(device), stays=stays, passes=passes)


def _models(config: Config) -> tuple[Any, Any]:
    """The policy, and the trunk of what judges it: the policy's own, or another model's."""
    model = _model(AutoModelForCausalLM, config.model)
    if config.model.lora_r is not None:
        add_adapter(model, config.model, seed=config.seed)
    settings = config.discriminator
    judged = config.objective.lambda_adv > 0 and settings.kind != "remote"
    if settings.model_name_or_path is None or not judged:
        return model, model.base_model
    return model, _model(AutoModel, ModelConfig(model_name_or_path=settings.model_name_or_path))


def _model(load: Any, config: ModelConfig) -> Any:
    """A model of shapes alone: peft moves what it adds, which tensors that play at having memory cannot."""
    described = load_model_config(config)
    optional = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    with torch.device("meta"):
        model = load.from_config(
            described, dtype=torch.float32, trust_remote_code=config.trust_remote_code, **optional
        ).eval()
    if model.config._attn_implementation == "sdpa":
        model.config._attn_implementation = NAME
    return model


def _take_memory(model: Any, device: torch.device) -> None:
    model.to_empty(device=device)
    # What was tied has been given memory of its own.
    model.tie_weights()


def _longest_prompt(inputs: RunInputs) -> int:
    return max(len(example.prompt_ids) for example in inputs.dataset.examples)


def _readings(config: Config, inputs: RunInputs) -> "tuple[Reading, Reading]":
    """The largest micro-batches of policy and discriminator."""
    rows = _longest_step(config, inputs)
    packed = config.batching.packing and config.model.attn_implementation in (None, "sdpa")
    most = max(2, config.batching.max_tokens_per_micro_batch // max(row.length for row in rows))
    parts = (_largest(rows, config.batching, packed=packed), rows[:most])
    policy, discriminator = (Reading.of(part, packed=packed) for part in parts)
    return policy, discriminator


def _longest_step(config: Config, inputs: RunInputs) -> list[Row]:
    """The rows of a step in which every text is as long as it may be."""
    objective, batching, settings = config.objective, config.batching, config.rollout
    rows: list[Row] = []
    if objective.uses_rollouts:
        prompt = _longest_prompt(inputs)
        rows += [
            _row(number, prompt, settings.max_completion_length)
            for number in range(batching.prompts_per_step)
            for _ in range(settings.num_generations)
        ]
    if objective.learns_from_demonstrations:
        prompt, completion = max(
            (
                (len(example.prompt_ids), len(example.demonstration_ids))
                for example in inputs.dataset.examples
                if example.demonstration_ids is not None
            ),
            key=sum,
        )
        rows += [_row(-1 - n, prompt, completion) for n in range(batching.demonstrations_per_step)]
    return rows


def _row(number: int, prompt: int, completion: int) -> Row:
    """All rows of a number have the same prompt."""
    return Row(prompt_ids=(number,) * prompt, completion_ids=(0,) * completion, components=frozenset({"sft"}))


@dataclass(frozen=True)
class Reading:
    """A micro-batch as a model reads it; made where indices have values, read where tensors hold none."""

    input_ids: Tensor
    packing: Packing | None
    predicting: Tensor
    """Indices among the hidden states of those that predict a completion's token."""

    @staticmethod
    def of(rows: list[Row], *, packed: bool) -> "Reading":
        """The micro-batch of these rows."""
        batch = collate(rows, pad_id=0, packed=packed)
        index = torch.arange(batch.input_ids.numel()).view_as(batch.input_ids)
        packing = None
        if packed:
            packing = Packing(batch.spans, batch.input_ids.shape[1], torch.device("cpu"))
            index = packing.slots
        return Reading(torch.zeros_like(batch.input_ids), packing, index[:, :-1][batch.sft_mask[:, 1:]])

    def hidden(self, trunk: nn.Module) -> Tensor:
        """[N, D]."""
        if self.packing is not None:
            return packed_hidden(trunk, self.input_ids, self.input_ids, self.packing)
        mask = torch.ones_like(self.input_ids)
        return trunk(input_ids=self.input_ids, attention_mask=mask, use_cache=False)[0].flatten(0, 1)


def _largest(rows: list[Row], batching: BatchingConfig, *, packed: bool) -> list[Row]:
    """The rows of the largest micro-batch."""
    limits = {
        "max_tokens": batching.max_tokens_per_micro_batch,
        "max_rows": batching.per_device_train_batch_size,
    }
    if packed:
        parts = by_prompt([(row.prompt_ids, row.completion_ids) for row in rows], **limits)
    else:
        parts = by_length([row.length for row in rows], **limits)
    largest = max(parts, key=lambda part: sum(rows[index].length for index in part))
    return [rows[index] for index in largest]


def _learn(model: Any, reading: Reading, *, reads_twice: bool) -> None:
    """Forward and backward pass of a micro-batch as the policy does them."""
    hidden = reading.hidden(model.base_model)[reading.predicting]
    head = model.get_output_embeddings()
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        token_ids = torch.zeros(len(hidden), dtype=torch.int64)
        logprobs, _ = selected_logprobs(
            hidden, head.weight, token_ids, torch.ones(len(hidden)), bias=head.bias
        )
    if reads_twice:
        with torch.no_grad():
            reading.hidden(model.base_model)
    logprobs.sum().backward()


def _discriminate(trunk: nn.Module, reading: Reading) -> None:
    reading.hidden(trunk)[:1].float().sum().backward()
    trunk.zero_grad()


def _inputs(rows: int, width: int) -> dict[str, Tensor]:
    ids = torch.zeros(rows, width, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _rollout(counter: Counter, model: Any, config: Config, inputs: RunInputs) -> int:
    """What reading the prompts takes, and one more token for every row at its full length."""
    settings = config.rollout
    prompts = min(
        config.batching.prompts_per_step, max(1, settings.max_batch_size // settings.num_generations)
    )
    prompt = _longest_prompt(inputs)

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
            kept = width - 1
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = kept
                kept = min(kept, layer.sliding_window - 1)
            layer.keys = layer.keys.new_empty(*layer.keys.shape[:2], kept, layer.keys.shape[-1])
            layer.values = layer.values.new_empty(*layer.values.shape[:2], kept, layer.values.shape[-1])
        step: dict[str, Tensor] = {
            "input_ids": torch.zeros(rows, 1, dtype=torch.int64),
            "attention_mask": torch.ones(rows, width, dtype=torch.int64),
        }
        choose(model(**step, past_key_values=cache, use_cache=True).logits[:, -1].float())

    if settings.decoding == "fused" and supports_fused(model):
        return counter.taken_by(fused)
    return max(counter.taken_by(read), counter.taken_by(decode))


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
