"""The local sampler: greedy decoding equals `generate`, log-probabilities the trainer's, seeds decide."""

import pytest
import torch
from torch.testing import assert_close

from support.sampling import local_sampler
from support.tiny import CONFIGS, VOCABULARY, make_model
from uniapl.data.batching import Row, collate
from uniapl.errors import UsageError
from uniapl.models.policy import Policy
from uniapl.rollout import SampleRequest
from uniapl.rollout.local import LocalSampler, inverse_cdf

PROMPTS = [(5, 6, 7), (9,), (11, 12, 13, 14, 15, 16, 17), (20, 21)]
SEEDS = [100, 101, 102, 103]


def request(
    prompts: list[tuple[int, ...]] = PROMPTS, seeds: list[int] = SEEDS, *, num_generations: int
) -> SampleRequest:
    return SampleRequest(prompts=prompts, seeds=seeds, num_generations=num_generations)


def sampler(family: str = "qwen3", **settings: object) -> LocalSampler:
    defaults: dict[str, object] = {"stop_ids": {1}, "pad_id": 0, "max_completion_length": 12}
    return local_sampler(model=make_model(family), **(defaults | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_greedy_equals_generate(family: str) -> None:
    ours = sampler(family, temperature=0.0)
    groups = ours.sample(request(num_generations=2))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        expected = ours.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=12,
        )[0, len(prompt) :].tolist()
        assert [list(rollout.completion_ids) for rollout in group] == [expected, expected]


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_trainers(family: str, temperature: float) -> None:
    """Prompts and completions of many lengths: only the sampler pads on the left and uses a cache."""
    ours = sampler(family, temperature=temperature, stop_ids={1, 2, 3})
    groups = ours.sample(request(num_generations=4))
    rows = [
        Row(
            prompt_ids=prompt,
            completion_ids=rollout.completion_ids,
            components=frozenset({"rl", "kl"}),
            temperature=temperature,
            sampling_logprobs=rollout.sampling_logprobs,
        )
        for prompt, group in zip(PROMPTS, groups, strict=True)
        for rollout in group
    ]
    assert len({len(row.completion_ids) for row in rows}) > 2
    batch = collate(rows, pad_id=0)
    inputs = (
        batch.input_ids,
        batch.attention_mask,
        batch.position_ids,
        batch.rollout_mask,
        batch.temperature,
    )
    with torch.no_grad():
        logprobs, _ = Policy(ours.model)(*inputs)
    assert batch.sampling_logprobs.abs().max() > 1
    assert_close(logprobs, batch.sampling_logprobs, atol=1e-4, rtol=0)


def test_the_chunked_head_is_used_where_it_is_exact_and_only_there() -> None:
    linear = {family: Policy(make_model(family)).has_linear_head for family in sorted(CONFIGS)}
    assert linear.pop("gemma2_softcap") is False
    assert set(linear.values()) == {True}


def test_a_prompt_s_rollouts_do_not_depend_on_the_other_prompts() -> None:
    together = sampler().sample(request(num_generations=3))
    for max_batch_size in (1, 6, 1000):
        few_rows = sampler(max_batch_size=max_batch_size)
        for index, prompt in enumerate(PROMPTS):
            (alone,) = few_rows.sample(request([prompt], [SEEDS[index]], num_generations=3))
            assert [r.completion_ids for r in alone] == [r.completion_ids for r in together[index]]
        all_of_them = few_rows.sample(request(num_generations=3))
        assert [[r.completion_ids for r in g] for g in all_of_them] == [
            [r.completion_ids for r in g] for g in together
        ]


def test_seeds_decide() -> None:
    first, other = (sampler().sample(request([PROMPTS[0]], [seed], num_generations=4))[0] for seed in (1, 2))
    assert [r.completion_ids for r in first] != [r.completion_ids for r in other]
    assert len({r.completion_ids for r in first}) > 1, "the rollouts of a group differ"


def test_end_and_length() -> None:
    """A completion ends with its stop token, which belongs to it, or at the length limit."""
    groups = sampler(stop_ids=set(range(1, VOCABULARY, 8))).sample(
        SampleRequest(prompts=PROMPTS, seeds=SEEDS, num_generations=8, policy_version=3)
    )
    rollouts = [rollout for group in groups for rollout in group]
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        *body, last = rollout.completion_ids
        assert all(token % 8 != 1 for token in body)
        assert (last % 8 == 1) == (rollout.finish_reason == "stop")
        assert rollout.finish_reason == "stop" or len(rollout.completion_ids) == 12
        assert len(rollout.sampling_logprobs) == len(rollout.completion_ids)
        assert rollout.policy_version == 3


def test_frequencies_are_the_model_s_probabilities() -> None:
    model = make_model(scale=2.0)
    ours = local_sampler(
        model=model, stop_ids={1}, pad_id=0, max_completion_length=1, temperature=0.7, max_batch_size=10_000
    )
    (group,) = ours.sample(request([PROMPTS[0]], [0], num_generations=8_000))
    counts = torch.bincount(torch.tensor([r.completion_ids[0] for r in group]), minlength=VOCABULARY)
    with torch.no_grad():
        probs = torch.softmax(model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7, -1)
    # Five standard errors of a multinomial frequency.
    error = (counts / 8_000 - probs).abs()
    assert (error < 5 * (probs * (1 - probs) / 8_000).sqrt() + 1e-4).all()


def test_truncated_sampling_reports_logprobs_of_the_full_distribution() -> None:
    ours = sampler(top_k=2, temperature=1.0)
    (group,) = ours.sample(request([PROMPTS[0]], [0], num_generations=64))
    with torch.no_grad():
        logprobs = torch.log_softmax(ours.model(torch.tensor([PROMPTS[0]])).logits[0, -1], -1)
    likeliest = set(logprobs.topk(2).indices.tolist())
    for rollout in group:
        assert rollout.completion_ids[0] in likeliest
        assert rollout.sampling_logprobs[0] == pytest.approx(
            float(logprobs[rollout.completion_ids[0]]), abs=1e-4
        )


def test_inverse_cdf_edges() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(4, -1)
    uniforms = torch.tensor([0.0, 0.49, 0.5, 1 - 1e-16], dtype=torch.float64)
    assert inverse_cdf(probs, uniforms).tolist() == [1, 1, 3, 3], "never a token of probability 0"


def test_a_model_without_a_cache_is_refused() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1)
    )
    ours = local_sampler(model=model, stop_ids={1}, pad_id=0, max_completion_length=2)
    with pytest.raises(UsageError, match="no key-value cache"):
        ours.sample(request([PROMPTS[0]], [0], num_generations=2))
