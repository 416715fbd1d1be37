"""Peak memory of a stage, computed from the model's shapes before any weight is loaded."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import psutil
import torch
from transformers import AutoModel, AutoModelForCausalLM

from uniapl.config import BatchingConfig, Config, ModelConfig
from uniapl.data.batching import Row, batch_rows, chosen_rows
from uniapl.functional.logprobs import CHUNK_LOGITS
from uniapl.models.loading import ModelSource, load_model_config
from uniapl.models.lora import add_adapter
from uniapl.models.policy import keep_first_layers
from uniapl.rollout.fused import supports_fused
from uniapl.training.build_teacher import teacher_source
from uniapl.training.checkpoint.disk import format_bytes
from uniapl.training.demonstration_states import CACHE_BYTES
from uniapl.training.inputs import RunInputs
from uniapl.training.state_adversary import STATE_KINDS
from uniapl.types import TokenIds

MOST_ROWS = 100_000
"""Rows of each kind that the largest micro-batch is searched among."""
MOMENTS = 2
"""AdamW's moments, each as large as the trained weights."""
CPU_SLACK = 0.15
"""Fraction that a CPU's allocator takes in addition to what is requested. Our measurement (docs/log.md)."""

_MICRO_BATCH = "batching.max_tokens_per_micro_batch"
TO_LOWER = {
    "update": f"{_MICRO_BATCH}, or set optim.gradient_checkpointing",
    "discriminator": _MICRO_BATCH,
    "rollout": "rollout.max_batch_size or rollout.max_completion_length",
    "weights for vLLM": "the size of the model",
}
"""Phase -> what to lower if it does not fit."""
SMALLER_MODEL = (
    "What is allocated throughout does not fit: use a smaller model, set model.lora_r, or shard the model "
    "over several GPUs (FSDP2)"
)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes at a stage's peak: what is allocated throughout, plus the phase that allocates most."""

    device: str
    available: int
    """Bytes that the device has free now."""
    stays: dict[str, int]
    passes: dict[str, int]
    """Phase -> bytes that it allocates in addition and frees again."""

    @property
    def peak(self) -> int:
        """Bytes in the phase that allocates most."""
        slack = CPU_SLACK if self.device == "cpu" else 0.0
        return sum(self.stays.values()) + round((1 + slack) * max(self.passes.values()))

    def __str__(self) -> str:
        phase = max(self.passes, key=lambda name: self.passes[name])
        stays, passes = (
            ", ".join(f"{name} {format_bytes(count)}" for name, count in parts.items())
            for parts in (self.stays, self.passes)
        )
        warning, remedy = "", ""
        if self.peak > self.available:
            warning = "warning: "
            fits = sum(self.stays.values()) < self.available
            remedy = f". Lower {TO_LOWER[phase]}" if fits else f". {SMALLER_MODEL}"
        return (
            f"{warning}estimated peak: {format_bytes(self.peak)} on the {self.device} ({phase}), if every "
            f"completion has the maximum length; {format_bytes(self.available)} are free. "
            f"Allocated throughout: {stays}; in addition, one phase at a time: {passes}{remedy}"
        )


class Batch(NamedTuple):
    """Sizes of a micro-batch: tokens (packed, a prompt counts once), gathered keys, elements of the masks."""

    tokens: int
    completion_tokens: int
    keys: int
    scores: int


class Footprint:
    """Bytes that a model allocates in each phase, from the tensors that a Llama or Qwen layer keeps.

    The peaks are within 4 % of those of a step on tensors without data (docs/log.md).
    """

    def __init__(self, model: Any, *, bf16: bool, repeats_keys: bool) -> None:
        """With `repeats_keys`, attention copies keys and values for every query head; `bf16`: autocast."""
        self.config = config = model.config.get_text_config()
        self.number = 2 if bf16 else 4
        """Bytes per element of what matrix products read and write; weights, residuals and norms are fp32."""
        named = dict(model.named_parameters())
        self.head_norms = any(".q_norm." in name for name in named)
        self.weights = sum(p.nbytes for p in named.values())
        self.merged = sum(p.nbytes for name, p in named.items() if ".lora_" not in name)
        trained = [p.nbytes for p in named.values() if p.requires_grad]
        self.trained, self.largest = sum(trained), max(trained)
        self.frozen = self.trained < self.weights
        """Only adapters are trained."""
        table = model.get_input_embeddings().weight
        self.embedding = table.nbytes
        self.matrices = sum(p.nbytes for p in named.values() if p.ndim > 1 and p.shape != table.shape)
        self.casts = self.matrices // 2 if bf16 else 0
        """The bf16 copies of matrices, which autocast keeps until a pass ends."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.queries = head_dim * heads
        self.keys = head_dim * (getattr(config, "num_key_value_heads", None) or heads)
        self.gathered_keys = self.queries if repeats_keys else self.keys
        self.intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size

    def saved(self, batch: Batch) -> int:
        """What one layer keeps for the backward pass."""
        n, trained = self.number, not self.frozen
        # A norm keeps its fp32 input and, if its weight is trained, the normalized input. The five products
        # behind the two norms share two fp32 inputs, but cast one each to bf16.
        per_token = self.config.hidden_size * (2 * 4 * (1 + trained) + (2 * n if n == 4 else 5 * n))
        # Gate, activation, up and their product; queries, attention's output and its copy in row order.
        per_token += 4 * n * self.intermediate + 3 * n * self.queries
        if self.head_norms:
            per_token += (self.queries + self.keys) * (4 + n * trained)
        masks = 2 * batch.scores if n == 2 else 0
        return batch.tokens * per_token + batch.keys * 2 * n * self.gathered_keys + masks

    def transient(self, batch: Batch) -> int:
        """What a pass through one layer allocates and frees."""
        return batch.tokens * (8 * self.config.hidden_size + 3 * self.number * self.intermediate)

    def update(self, batch: Batch, *, checkpointing: bool) -> int:
        """An update of the policy: gradients, the layers, the output head, and the optimizer's step."""
        layers, hidden, n = self.config.num_hidden_layers, self.config.hidden_size, self.number
        saved, layer, casts = layers * self.saved(batch), 0, self.casts
        if checkpointing:
            saved, layer = layers * batch.tokens * 4 * hidden, self.saved(batch)
            casts //= layers if self.frozen else 1
        saved += casts + 4 * batch.scores + batch.completion_tokens * hidden * (8 if n == 2 else 4)
        # Logits of a chunk, in fp32: the last chunk's are alive while the next one's are computed.
        logits = 4 * batch.completion_tokens * self.config.vocab_size
        chunk = min(4 * CHUNK_LOGITS, logits)
        buffers = 3.0 if logits > chunk else 2.5 if n == 2 else 2.0
        gradient = 0 if self.frozen else self.embedding
        head = round(max(buffers * chunk, 2 * chunk + 2 * gradient)) + (self.embedding // 2 if n == 2 else 0)
        return self.trained + max(
            saved + max(head, layer + gradient + self.transient(batch)), 3 * self.largest
        )

    def discriminate(self, batch: Batch) -> int:
        """A discriminator's forward and backward pass, which ends with all gradients."""
        saved = self.config.num_hidden_layers * self.saved(batch) + self.casts + 4 * batch.scores
        return max(saved + self.transient(batch), self.trained + self.embedding)

    def rollout(
        self, prompts: int, rows: int, prompt: int, completion: int, *, fused: bool, turns: bool
    ) -> int:
        """The KV cache at its full length, and the larger of reading the prompts and the last step.

        Args:
            fused: Sampling copies the weights and allocates the cache once. Else every token copies one
                layer's keys.
            turns: The caches of the rows stay for their next turn.
        """
        layers, n = self.config.num_hidden_layers, self.number
        cache = rows * (prompt + completion) * self.keys
        logits = rows * self.config.vocab_size
        read = prompts * prompt * (8 * self.config.hidden_size + (5 if fused else 3) * n * self.intermediate)
        if fused:
            copies = (self.matrices + self.embedding) * n // 4
            return copies + (1 + turns) * 2 * n * layers * cache + max(read, (8 + n) * logits)
        return max(read, n * (2 * layers + 1) * cache + 8 * logits)


def estimate_memory(config: Config, inputs: RunInputs, device: torch.device) -> MemoryEstimate:
    """The peak of a stage in one process if every completion has the maximum length.

    Args:
        device: The device that trains; on a CPU the process itself, with the data, is included.
    """
    objective, batching = config.objective, config.batching
    bf16 = device.type == "cuda" if config.optim.bf16 is None else config.optim.bf16
    packed = batching.packing and config.model.attn_implementation in (None, "sdpa")
    repeats_keys = not packed or device.type == "cuda"
    model = _model(AutoModelForCausalLM, inputs.source)
    if config.model.lora_r is not None:
        add_adapter(model, config.model, seed=config.seed)
    policy = Footprint(model, bf16=bf16, repeats_keys=repeats_keys)
    rows = _longest_step(config, inputs)
    largest = _batch(_largest(rows, batching, packed=packed), packed=packed)
    stays = {"process": psutil.Process().memory_info().rss} if device.type == "cpu" else {}
    stays |= {"policy": policy.weights, "optimizer": MOMENTS * policy.trained}
    on_states = objective.lambda_adv > 0 and config.discriminator.kind in STATE_KINDS
    if objective.uses_reference or on_states:
        stays["reference"] = policy.trained
    if objective.teacher_kl and config.teacher.url is None:
        teacher = _model(AutoModelForCausalLM, teacher_source(config.teacher))
        # See `build_teacher`: in bf16 on a device that computes in bf16.
        halved = bf16 and device.type != "cpu"
        stays["teacher"] = Footprint(teacher, bf16=bf16, repeats_keys=False).weights // (1 + halved)
    if on_states:
        stays["states of completions"] = _states(config, inputs, policy)
    passes = {"update": policy.update(largest, checkpointing=config.optim.gradient_checkpointing)}
    rollout = config.rollout
    if objective.uses_rollouts and rollout.sampler == "vllm":
        if rollout.vllm_mode == "colocate":
            stays["vllm"] = round(rollout.vllm_gpu_memory_utilization * _available(device))
        # On the CPU, wherever the policy trains: a copy with the adapter merged, and one in bf16.
        copies = (config.model.lora_r is not None) + bf16 / 2
        if device.type == "cpu" and copies:
            passes["weights for vLLM"] = round(copies * policy.merged)
    elif objective.uses_rollouts:
        prompts = min(batching.prompts_per_step, max(1, rollout.max_batch_size // rollout.num_generations))
        passes["rollout"] = policy.rollout(
            prompts,
            prompts * rollout.num_generations,
            _longest_prompt(inputs),
            rollout.max_completion_length,
            fused=rollout.decoding == "fused" and supports_fused(model),
            turns=bool(rollout.tools or rollout.environment),
        )
    settings = config.discriminator
    if objective.lambda_adv > 0 and settings.kind not in ("remote", *STATE_KINDS):
        trunk, pairwise = _discriminator_trunk(config, model), settings.kind == "bradley-terry"
        learns = pairwise and settings.lora_r is None
        # With lora_r it is adapters on the policy itself; else a model, or a copy with the adapter merged.
        separate = learns or settings.model_name_or_path is not None
        if separate:
            trunk.requires_grad_(True)
        discriminator = Footprint(trunk, bf16=bf16, repeats_keys=repeats_keys)
        if separate:
            stays["discriminator"] = discriminator.merged * (1 + MOMENTS * learns)
        if pairwise:
            most = max(2, batching.max_tokens_per_micro_batch // max(row.length for row in rows))
            passes["discriminator"] = discriminator.discriminate(_batch(rows[:most], packed=packed))
    return MemoryEstimate(device=device.type, available=_available(device), stays=stays, passes=passes)


def _states(config: Config, inputs: RunInputs, policy: Footprint) -> int:
    """The reference's states of a step's rollouts, and those of the demonstrations, which stay in a cache."""
    rollout, settings = config.rollout, config.discriminator
    features = policy.config.hidden_size * (len(settings.layers) or 1) if settings.kind == "head" else 0
    per_token = 4 * (features + 1)
    rollouts = config.batching.prompts_per_step * rollout.num_generations * rollout.max_completion_length
    shown = [len(e.demonstration_ids) for e in inputs.dataset.examples if e.demonstration_ids is not None]
    return per_token * rollouts + min(CACHE_BYTES, per_token * (1 + settings.num_mismatched) * sum(shown))


def _discriminator_trunk(config: Config, policy: Any) -> Any:
    """The discriminator's model without its head; the policy's own if it is a copy of all of its layers."""
    settings = config.discriminator
    if settings.model_name_or_path is not None:
        where = ModelConfig(
            model_name_or_path=settings.model_name_or_path, trust_remote_code=settings.trust_remote_code
        )
        return _model(AutoModel, ModelSource.resolve(where))
    if settings.num_layers is None:
        return policy.base_model
    trunk = copy.deepcopy(policy.base_model)
    keep_first_layers(trunk, settings.num_layers)
    return trunk


def _model(load: Any, source: ModelSource) -> Any:
    """The model on the meta device, which allocates nothing."""
    described, trusted = load_model_config(source), source.trust_remote_code
    with torch.device("meta"):
        return load.from_config(described, dtype=torch.float32, trust_remote_code=trusted)


def _longest_prompt(inputs: RunInputs) -> int:
    return max(len(example.prompt_ids) for example in inputs.dataset.examples)


def _longest_answer(inputs: RunInputs) -> int:
    """The longest demonstration or rejected completion."""
    examples = inputs.dataset.examples
    return max(len(ids or ()) for e in examples for ids in (e.demonstration_ids, e.rejected_ids))


def _longest_step(config: Config, inputs: RunInputs) -> list[Row]:
    """The rows of a step in which every text has its maximum length; equal numbers share a prompt.

    Of each kind only as many as one micro-batch can hold: a recipe may ask for more than any memory lists.
    """
    batching, generations = config.batching, config.rollout.num_generations
    most = min(batching.max_tokens_per_micro_batch, MOST_ROWS)
    rows: list[Row] = []
    if config.objective.uses_rollouts:
        count = min(batching.prompts_per_step * generations, most)
        size = (_longest_prompt(inputs), config.rollout.max_completion_length)
        rows += [_row(number // generations, *size) for number in range(count)]
        if config.objective.pairs_rollouts:
            rows = [
                replace(row, chosen=_row(row.prompt_ids[0], size[0], _longest_answer(inputs))) for row in rows
            ]
    if config.objective.pairs_rejected:
        size = (_longest_prompt(inputs), _longest_answer(inputs))
        pairs = (_row(-1 - number, *size) for number in range(min(batching.demonstrations_per_step, most)))
        rows += [replace(row, chosen=row) for row in pairs]
    if config.imitates:
        turns = (turn for e in inputs.dataset.examples for turn in e.demonstrated_turns)
        size = max(((len(turn.prompt), len(turn.completion)) for turn in turns), key=sum)
        count = min(batching.demonstrations_per_step, most)
        rows += [_row(-1 - number, *size) for number in range(count)]
    return rows


def _row(number: int, prompt: int, completion: int) -> Row:
    # A range has a length without taking memory.
    completion_ids = cast(TokenIds, range(completion))
    return Row(prompt_ids=(number,) * prompt, completion_ids=completion_ids, components=frozenset())


def _largest(rows: Sequence[Row], batching: BatchingConfig, *, packed: bool) -> list[Row]:
    """The rows of the largest micro-batch."""
    limit, most = batching.max_tokens_per_micro_batch, batching.per_device_train_batch_size
    parts = batch_rows(rows, max_tokens=limit, max_rows=most, packed=packed)
    return max(([*part, *chosen_rows(part)] for part in parts), key=_tokens)


def _tokens(rows: Sequence[Row]) -> int:
    return sum(row.length for row in rows)


def _batch(rows: Sequence[Row], *, packed: bool) -> Batch:
    completions = sum(len(row.completion_ids) for row in rows)
    if not packed:
        tokens = len(rows) * max(row.length for row in rows)
        return Batch(tokens, completions, keys=tokens, scores=0)
    prompts = sum(map(len, {row.prompt_ids for row in rows}))
    scores = sum(len(row.completion_ids) * row.length for row in rows)
    return Batch(prompts + completions, completions, keys=prompts + _tokens(rows), scores=scores)


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
