"""Stop strings, the repetition penalty and the truncations: values by hand, and `generate` with the same."""

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel

from support.sampling import local_sampler
from support.tiny import VOCABULARY, make_model, make_tokenizer
from uniapl.config import Config
from uniapl.demo.task import make_tokenizer as demo_tokenizer
from uniapl.errors import UsageError
from uniapl.rollout import SampleRequest
from uniapl.rollout.settings import SamplingSettings, StopStrings
from uniapl.types import Rollout

TOKENIZER = make_tokenizer()
MODEL = make_model("mistral_sliding", scale=6.0)
"""Its completions seldom repeat a token."""
PROMPTS = [(5, 6, 7), (9,), (11, 12, 13, 14, 15, 16, 17), (20, 21)]
LIMIT = 16


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False).input_ids)


def sample(model: PreTrainedModel, *, count: int = 2, **settings: Any) -> list[list[Rollout]]:
    defaults: dict[str, Any] = {"stop_ids": {1}, "pad_id": 0, "max_completion_length": LIMIT}
    sampler = local_sampler(model, **defaults | settings)
    request = SampleRequest(prompts=PROMPTS, seeds=[100, 101, 102, 103], num_generations=count)
    return [list(group) for group in sampler.sample(request)]


def generated(model: PreTrainedModel, prompt: tuple[int, ...], **settings: Any) -> list[int]:
    generate: Any = model.generate
    inputs = torch.tensor([prompt])
    output = generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=LIMIT,
        eos_token_id=1,
        pad_token_id=0,
        tokenizer=TOKENIZER,
        **settings,
    )
    return output[0, len(prompt) :].tolist()


def distribution(logits: list[float], history: list[int] | None = None, **settings: Any) -> list[float]:
    """The probabilities from which the next token is drawn."""
    sampling = SamplingSettings(max_completion_length=1, stop_ids=(), **settings)
    scores: Any = torch.tensor([logits])
    return sampling.processors(torch.tensor([history or [0]]), scores).softmax(-1)[0].tolist()  # type: ignore[arg-type]


def test_the_distribution_by_hand() -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert distribution(logits) == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert distribution(logits, top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    # 0.4 is less than 0.6 and 0.4 + 0.3 is more: both stay.
    assert distribution(logits, top_p=0.6) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    # The nucleus is a part of what top-k left: 0.4 / 0.7 = 0.57 reaches 0.5.
    assert distribution(logits, top_p=0.5, top_k=2) == pytest.approx([0, 1, 0, 0])
    # 0.6 * 0.4 = 0.24: 0.3 stays and 0.2 does not.
    assert distribution(logits, min_p=0.6) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    # min-p is relative to the distribution at the temperature: 0.2^2 / 0.4^2 is 0.25.
    assert distribution(logits, min_p=0.3, temperature=0.5) == pytest.approx([0, 16 / 25, 0, 9 / 25])
    # As in vLLM, min-p comes first: 0.4 / 0.7 reaches 0.55, which 0.4 of the full distribution does not.
    assert distribution(logits, min_p=0.6, top_p=0.55) == pytest.approx([0, 1, 0, 0])
    # The penalty comes before the temperature. It divides the logit 2 and multiplies the logit -1.
    penalised = distribution([2.0, -1.0, 0.5], history=[0, 1, 1], repetition_penalty=2.0, temperature=0.5)
    assert penalised == pytest.approx(torch.tensor([2.0, -4.0, 1.0]).softmax(-1).tolist())


@pytest.mark.parametrize("penalty", [0.7, 1.3, 4.0])
def test_the_penalty_equals_generate(penalty: float) -> None:
    """Prompts of several lengths in one batch: padding is no token of theirs, token 0 included."""
    groups = sample(MODEL, temperature=0.0, repetition_penalty=penalty)
    expected = [generated(MODEL, prompt, repetition_penalty=penalty) for prompt in PROMPTS]
    for group, one in zip(groups, expected, strict=True):
        assert [list(rollout.completion_ids) for rollout in group] == [one, one]
    assert expected != [generated(MODEL, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "settings",
    [{"min_p": 0.3}, {"repetition_penalty": 0.5}, {"min_p": 0.1, "top_p": 0.8, "top_k": 9}],
    ids=str,
)
def test_logprobs_are_those_of_the_policy_and_draws_those_of_the_warped_distribution(
    settings: dict[str, Any],
) -> None:
    temperature, count = 0.3, 4_000
    differences: list[float] = []
    sampling = {"temperature": temperature, "max_completion_length": 1, "max_batch_size": 20_000}
    for prompt, group in zip(PROMPTS, sample(MODEL, count=count, **sampling, **settings), strict=True):
        with torch.no_grad():
            logits: Any = MODEL(torch.tensor([prompt])).logits[:, -1]
        policy = (logits[0] / temperature).log_softmax(-1)
        chosen = torch.tensor([rollout.completion_ids[0] for rollout in group])
        reported = torch.tensor([rollout.sampling_logprobs[0] for rollout in group])
        assert_close(reported, policy[chosen], atol=1e-4, rtol=0)
        drawn = distribution(logits[0].tolist(), list(prompt), temperature=temperature, **settings)
        expected = torch.tensor(drawn)
        frequencies = torch.bincount(chosen, minlength=VOCABULARY) / count
        # Five standard errors of a multinomial frequency, and three draws for the rarest tokens.
        allowed = 5 * (expected * (1 - expected) / count).sqrt() + 3 / count
        assert ((frequencies - expected).abs() <= allowed).all()
        assert frequencies[expected == 0].sum() == 0
        differences.append(float((expected - policy.exp()).abs().max()))
    assert max(differences) > 0.02, "the two distributions differ"


def test_fused_and_plain_decoding_agree() -> None:
    model = make_model()
    settings: dict[str, Any] = {
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "stop_strings": StopStrings(["a", "bc", "the"], TOKENIZER),
        "count": 8,
    }
    fused, plain = (sample(model, decoding=decoding, **settings) for decoding in ("fused", "plain"))
    assert [[r.completion_ids for r in group] for group in fused] == [
        [r.completion_ids for r in group] for group in plain
    ]
    assert len({len(r.completion_ids) for group in fused for r in group}) > 4


def test_stop_strings_end_a_completion_as_in_generate() -> None:
    whole = [generated(MODEL, prompt) for prompt in PROMPTS]
    # Two tokens of the first completion, and one of the last.
    texts = [str(TOKENIZER.decode(part)) for part in (whole[0][2:4], whole[3][3:4])]
    groups = sample(MODEL, temperature=0.0, stop_strings=StopStrings(texts, TOKENIZER))
    for prompt, group, full in zip(PROMPTS, groups, whole, strict=True):
        expected = generated(MODEL, prompt, stop_strings=texts)
        for rollout in group:
            assert list(rollout.completion_ids) == expected
            assert len(rollout.sampling_logprobs) == len(expected)
            ended = len(expected) < LIMIT or expected[-1] == 1
            assert rollout.finish_reason == ("stop" if ended else "length")
        assert expected == full[: len(expected)]
    # The text belongs to the completion. The third ends with <unk>, which contains the second text, k.
    assert texts == ["vF", "k"]
    assert [len(group[0].completion_ids) for group in groups] == [4, LIMIT, 12, 4]


def test_a_text_that_begins_in_the_prompt_does_not_end_the_completion() -> None:
    prompt = PROMPTS[0]
    first = generated(MODEL, prompt)[0]
    strings = StopStrings([str(TOKENIZER.decode([prompt[-1], first]))], TOKENIZER)
    sampler = local_sampler(
        MODEL, stop_ids={1}, pad_id=0, max_completion_length=4, temperature=0.0, stop_strings=strings
    )
    ((rollout,),) = sampler.sample(SampleRequest(prompts=[prompt], seeds=[0], num_generations=1))
    assert len(rollout.completion_ids) == 4
    assert rollout.finish_reason == "length"


def settings_of(texts: list[str], **changes: Any) -> SamplingSettings:
    values: dict[str, Any] = {"max_completion_length": 8, "stop_ids": {1}} | changes
    return SamplingSettings(stop_strings=StopStrings(texts, TOKENIZER), **values)


@pytest.mark.parametrize(
    ("text", "kept", "reason"),
    [
        ("abcab", "abc", "stop"),
        ("xxabc", "xxabc", "stop"),
        ("ab.cab,", "ab.cab,", "stop"),
        ("xabxxxxx", "xabxxxxx", "length"),
        ("x\n\nabc", "x\n\n", "stop"),
    ],
)
def test_a_completion_is_cut_after_the_first_text(text: str, kept: str, reason: str) -> None:
    """What a sampler drew after the end is removed; without an end it is truncated only at the limit."""
    tokens = ids(text)
    settings = settings_of(["abc", "\n\n", ","])
    (rollout,) = settings.rollouts([(tokens, [-0.5] * len(tokens))], policy_version=3)
    assert rollout.completion_ids == tuple(ids(kept))
    assert rollout.sampling_logprobs == (-0.5,) * len(ids(kept))
    assert rollout.finish_reason == reason


def test_stop_tokens_and_texts_end_at_the_first_of_them() -> None:
    before, after = [1, *ids("abc")], [*ids("abc"), 1]
    found = settings_of(["abc"]).rollouts([(x, [0.0] * 4) for x in (before, after)], policy_version=0)
    assert [r.completion_ids for r in found] == [(1,), tuple(ids("abc"))]


def test_a_sampler_that_stopped_before_the_limit_did_not_truncate() -> None:
    (rollout,) = settings_of(["zz"]).rollouts([(ids("abc"), [0.0] * 3)], policy_version=0)
    assert rollout.finish_reason == "stop"


def test_a_text_that_the_tokenizer_cannot_write_is_refused() -> None:
    with pytest.raises(UsageError, match="stop_strings: the tokenizer cannot write 'a§'"):
        StopStrings(["ab", "a§"], TOKENIZER)


def test_the_sections_of_the_recipe() -> None:
    values: dict[str, Any] = {
        "rollout": {"min_p": 0.1, "repetition_penalty": 1.1, "top_k": 5, "stop_strings": ["ab", "c"]},
        "evaluation": {"min_p": 0.2, "top_p": 0.9, "num_samples": 2},
    }

    def of(config: Config) -> list[tuple[Any, ...]]:
        found = [
            make(config, {1, 2}, TOKENIZER)
            for make in (SamplingSettings.of_rollouts, SamplingSettings.of_evaluation)
        ]
        return [
            (
                *(s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty),
                None if s.stop_strings is None else s.stop_strings.strings,
            )
            for s in found
        ]

    assert of(Config.model_validate(values)) == [
        (1.0, 1.0, 5, 0.1, 1.1, ("ab", "c")),
        (1.0, 0.9, 0, 0.2, 1.0, ("ab", "c")),
    ]
    values["evaluation"] = {"stop_strings": []}
    assert of(Config.model_validate(values))[1] == (0.0, 1.0, 0, 0.0, 1.0, None)
    values["evaluation"] = {"stop_strings": "x"}
    assert of(Config.model_validate(values))[1][-1] == ("x",)


def test_stop_strings_need_a_tokenizer_that_writes_letters() -> None:
    """The demo's has one token per word."""
    with pytest.raises(UsageError, match=r"cannot write each letter.*model\.stop_tokens"):
        StopStrings(["king"], demo_tokenizer())
