"""Equal results on the device: packed and padded rows, chunked and full log-probabilities, fused and plain
decoding, sampler and trainer, and a resumed run and an uninterrupted one."""

import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from ours import our_rows, our_stage
from resume import resumed_difference
from stage import Report, parse, sized
from torch import Tensor
from work import Shape, Work, make_work, save_model

from uniapl.data.batching import Row, micro_batches
from uniapl.functional import logprobs_from_logits, objective, selected_logprobs
from uniapl.rollout import SampleRequest
from uniapl.rollout.local import LocalSampler
from uniapl.training.inputs import RunInputs
from uniapl.training.stage import Stage
from uniapl.training.update.batch import MixedBatch
from uniapl.training.update.policy_step import component_sums, policy_logprobs
from uniapl.types import MicroBatch, Rollout

SHAPE = Shape(
    model="qwen3-0.6b",
    prompts=4,
    generations=8,
    prompt_length=128,
    completion_length=128,
    vocabulary=151_936,
)
GRADIENT = {False: 1e-4, True: 5e-2}
"""bf16 -> bound of the relative difference of two gradients."""
LOGPROB = {False: 1e-4, True: 0.05}
"""bf16 -> bound of the mean difference of log-probabilities; in bf16 health.max_sampling_difference."""


def relative(one: Tensor, other: Tensor) -> float:
    """Norm of the difference, divided by the norm of `other`."""
    return float((one - other).detach().norm() / other.detach().norm())


def as_micro_batches(rows: list[Row], stage: Stage, inputs: RunInputs, *, packed: bool) -> list[MicroBatch]:
    return micro_batches(
        rows, pad_id=inputs.pad_id, max_tokens=4096, packed=packed, device=stage.model.device
    )


def gradient(stage: Stage, rows: list[Row], inputs: RunInputs, *, packed: bool) -> Tensor:
    """The gradient of the loss over all parameters, flattened."""
    batches = as_micro_batches(rows, stage, inputs, packed=packed)
    batch = MixedBatch(rows=rows, micro_batches=batches, weights=stage.schedule.weights([]))
    for part in batches:
        logprobs, _ = policy_logprobs(stage.policy, part)
        sums = component_sums(logprobs, logprobs.detach(), part, stage.loss_settings)
        objective(sums, batch.weights, stage.loss_settings.divisors(batch)).backward()
    found = torch.cat([p.grad.flatten().clone() for p in stage.policy.parameters() if p.grad is not None])
    stage.policy.zero_grad()
    return found


def packed_and_padded(report: Report, work: Work, folder: Path, options: Namespace) -> None:
    """The gradient of packed rows equals that of padded rows."""
    _, stage, inputs = our_stage(work, folder, options)
    report.check(f"packing is used, {precision(options)}", float(stage.packing), 1, at_least=True)
    rows = our_rows(work, stage)
    packed, padded = (gradient(stage, rows, inputs, packed=packed) for packed in (True, False))
    report.check(
        f"gradient, packed and padded, {precision(options)}",
        relative(packed, padded),
        GRADIENT[options.bf16],
    )


def chunked_and_full(report: Report, options: Namespace) -> None:
    """Log-probabilities in chunks equal those of the full logits, and so do their gradients."""
    tokens, hidden_size, vocabulary = (64, 32, 512) if options.tiny else (512, 1024, 151_936)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    generator = torch.Generator(options.device).manual_seed(0)
    made = {"device": options.device, "generator": generator}
    hidden = torch.randn(tokens, hidden_size, dtype=dtype, **made).requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, **made) * hidden_size**-0.5).requires_grad_()
    ids = torch.randint(vocabulary, (tokens,), **made)
    temperature = torch.full((tokens,), 0.7, device=options.device)
    chunked, _ = selected_logprobs(hidden, weight, ids, temperature, chunk_size=tokens // 4)
    full, _ = logprobs_from_logits((hidden @ weight.to(dtype).T).float(), ids, temperature)
    gradients = [torch.autograd.grad(found.sum(), (hidden, weight)) for found in (chunked, full)]
    report.check(f"log-probabilities, chunked and full, {precision(options)}", relative(chunked, full), 1e-5)
    for name, one, other in zip(("hidden states", "head"), *gradients, strict=True):
        report.check(
            f"gradient of the {name}, chunked and full, {precision(options)}",
            relative(one.float(), other.float()),
            1e-2 if options.bf16 else 1e-4,
        )


def sample(stage: Stage, work: Work) -> list[Rollout]:
    request = SampleRequest(
        prompts=[tuple(prompt) for prompt in work.prompts],
        seeds=list(range(len(work.prompts))),
        num_generations=work.shape.generations,
    )
    return [rollout for group in stage.sampler.sample(request) for rollout in group]


def sampler_and_trainer(report: Report, work: Work, folder: Path, options: Namespace) -> None:
    """Fused and plain decoding sample the same tokens, with the trainer's log-probabilities."""
    sampled: list[list[Rollout]] = []
    for decoding in ("fused", "plain"):
        _, stage, inputs = our_stage(work, folder, options, rollout={"decoding": decoding})
        rollouts = sample(stage, work)
        if decoding == "fused":
            assert isinstance(stage.sampler, LocalSampler)
            used = float(stage.sampler.fused)
            report.check(f"fused decoding is used, {precision(options)}", used, 1, at_least=True)
        differences: list[Tensor] = []
        for part in as_micro_batches(our_rows(work, stage, rollouts), stage, inputs, packed=stage.packing):
            with torch.no_grad():
                logprobs, _ = policy_logprobs(stage.policy, part)
            differences.append((logprobs - part.sampling_logprobs).abs()[part.rollout_mask])
        report.check(
            f"log-probabilities, {decoding} sampler and trainer, {precision(options)}",
            float(torch.cat(differences).mean()),
            LOGPROB[options.bf16],
        )
        sampled.append(rollouts)
    equal = [one.completion_ids == other.completion_ids for one, other in zip(*sampled, strict=True)]
    # A difference in the last digit can change a token, and with it the rest of a completion. In bf16 this
    # happens in most completions, so the fraction is only recorded.
    report.check(
        f"fraction of equal completions, fused and plain decoding, {precision(options)}",
        sum(equal) / len(equal),
        0.0 if options.bf16 else 0.9,
        at_least=True,
    )


def precision(options: Namespace) -> str:
    return "bf16" if options.bf16 else "fp32"


def main() -> None:
    """Check everything in fp32 and in bf16."""
    options = parse()
    report = Report("equivalence", options)
    shape = sized(SHAPE, options)
    work = make_work(shape)
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(shape, Path(name) / "model", device=options.device)
        for options.bf16 in (False, True):
            chunked_and_full(report, options)
            packed_and_padded(report, work, folder, options)
            sampler_and_trainer(report, work, folder, options)
    resumed_difference(report, options, steps=4, bf16=False)
    report.finish()


if __name__ == "__main__":
    main()
