"""What closed a completion, and how it was split into tokens, does not reach a discriminator."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, Qwen3Config

from support import lora_trunk
from support.candidates import polar_tokenizer
from support.tiny import SMALL, make_model
from uniapl.config import Config
from uniapl.discriminator import Discriminator
from uniapl.discriminator.bradley_terry import (
    AdversaryState,
    BradleyTerryDiscriminator,
    Comparison,
    Replay,
    ScoreModel,
    another_example,
)
from uniapl.discriminator.density_ratio import DensityRatio
from uniapl.discriminator.ending import UniformEnding
from uniapl.discriminator.polar import Polar, PolarFormat
from uniapl.discriminator.remote import Remote
from uniapl.models.packing import can_pack
from uniapl.models.policy import Policy
from uniapl.training.adversary import Adversary, DiscriminatorTrainer
from uniapl.types import Example, Rollout, RolloutGroup, TokenIds

EOS, TURN = 1, 3
CPU = torch.device("cpu")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, the token "ab", and the end token "<end>", which is not a special token."""
    marks = ["<pad>", "<eos>", "<unk>", "<turn>"]
    vocabulary = {token: number for number, token in enumerate([*marks, *"abcdefgh .,\n", "ab"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.add_tokens(["<end>"])
    return tokenizer


TOKENIZER = merging_tokenizer()
END = cast("int", TOKENIZER.convert_tokens_to_ids("<end>"))


def ids_of(text: str, *ends: int) -> TokenIds:
    return (*TOKENIZER(text).input_ids, *ends)


def rollout(ids: TokenIds) -> Rollout:
    return Rollout(
        completion_ids=ids,
        sampling_logprobs=(-1.0,) * len(ids),
        finish_reason="stop" if ids[-1] in (EOS, TURN, END) else "length",
        policy_version=0,
    )


def group(
    demonstration: TokenIds | None, *completions: TokenIds, prompt: str = "fgh", **columns: Any
) -> RolloutGroup:
    example = Example(
        row=1,
        prompt=prompt,
        prompt_ids=ids_of(prompt),
        demonstration="the data's text",
        demonstration_ids=demonstration,
        columns={},
        **columns,
    )
    decode: Any = TOKENIZER.decode
    return RolloutGroup(
        example=example,
        rollouts=tuple(map(rollout, completions)),
        texts=tuple(decode(list(ids), skip_special_tokens=True) for ids in completions),
        reward_parts={},
    )


ENDING = UniformEnding(tokenizer=TOKENIZER, stop_ids={EOS, TURN, END}, end_id=EOS)
SAME = [
    ids_of("abc.", EOS),
    ids_of("abc.", TURN),
    ids_of("abc.", END),
    ids_of("abc."),
    (*ids_of("a"), *ids_of("b"), *ids_of("c.", TURN)),
]
"""One text: closed by each end token, cut by the length limit, and in other tokens."""
OTHER = [ids_of("cab.", EOS), ids_of("abc", EOS), ids_of("abc"), ids_of("abc. "), ids_of("h" * 20)]


def bradley_terry(*, packed: bool = False) -> BradleyTerryDiscriminator:
    module = ScoreModel.copy_of(make_model())
    torch.manual_seed(3)
    with torch.no_grad():
        module.head.weight.normal_()
    return BradleyTerryDiscriminator(
        module=module, pad_id=0, max_tokens=60, packed=packed and can_pack(module.trunk)
    )


def density_ratio() -> DensityRatio:
    expert, start = Policy(make_model(seed=1)), Policy(make_model(seed=2))
    return DensityRatio(expert=expert, reference=start, pad_id=0, max_tokens=60, packed=True, device=CPU)


def polar() -> Polar:
    torch.manual_seed(5)
    config = Qwen3Config(**{**SMALL, "vocab_size": 70, "num_labels": 1})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return Polar(model=model, format=PolarFormat(tokenizer=polar_tokenizer()), max_tokens=60)


class Served(Remote):
    """A server whose score depends on every character of the text and on its place."""

    def _request(self, texts: list[str]) -> list[float]:
        return [sum(place * ord(letter) for place, letter in enumerate(text)) / 1e4 for text in texts]


def remote() -> Remote:
    form = PolarFormat(tokenizer=polar_tokenizer())
    return Served(url="", server="vllm", model="", format=form, timeout=1.0, max_retries=0, batch_size=3)


def in_context() -> BradleyTerryDiscriminator:
    others = [group(ids_of("ccc", EOS)).example, group(ids_of("abc.", END), prompt="g").example]
    shown = another_example([*map(ENDING.example, others)], seed=0)
    return replace(bradley_terry(), context=shown)


def adversary(discriminator: Discriminator, ending: UniformEnding = ENDING) -> Adversary:
    return Adversary(discriminator=discriminator, trainer=None, state=AdversaryState(), ending=ending)


KINDS: dict[str, Callable[[], Discriminator]] = {
    "bradley-terry": bradley_terry,
    "packed": lambda: bradley_terry(packed=True),
    "in context": in_context,
    "lora": lambda: lora_trunk.on(make_model(), trained=True),
    "density-ratio": density_ratio,
    "polar": polar,
    "remote": remote,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("expert", SAME, ids=["eos", "turn", "end", "cut", "split"])
def test_identical_text_has_the_identical_logit(kind: str, expert: TokenIds) -> None:
    subject = adversary(KINDS[kind]())
    ((policy, demonstration),) = subject.score([group(expert, *SAME, *OTHER)])
    assert policy is not None
    assert demonstration is not None
    assert policy[: len(SAME)] == pytest.approx([demonstration] * len(SAME), abs=1e-6)
    cab, abc, cut, *rest = policy[len(SAME) :]
    assert abc == pytest.approx(cut, abs=1e-6)
    assert min(abs(x - demonstration) for x in (cab, abc, *rest)) > 1e-4, "another text, another logit"
    alone = subject.score([group(expert, ids) for ids in (*SAME, *OTHER)])
    assert [scores[0] for scores, _ in alone if scores] == pytest.approx(list(policy), abs=1e-3)


def test_every_completion_is_its_text_and_one_end_token() -> None:
    given = group(SAME[2], *SAME, *OTHER, (EOS,), rejected_ids=ids_of("h", TURN))
    seen = ENDING.group(given)
    expected = [*["abc."] * len(SAME), "cab.", "abc", "abc", "abc. ", "h" * 20, ""]
    assert [r.completion_ids for r in seen.rollouts] == [ids_of(text, EOS) for text in expected]
    assert list(seen.texts) == expected
    assert seen.example.demonstration_ids == ids_of("abc.", EOS)
    assert seen.example.rejected_ids == ids_of("h", EOS)
    assert seen.example.prompt_ids == given.example.prompt_ids
    without = ENDING.group(group(None, ids_of("a"))).example
    assert (without.demonstration_ids, without.rejected_ids) == (None, None)
    assert given.rollouts[0].completion_ids == SAME[0], "the policy is trained on what it sampled"


def test_a_stop_string_does_not_tell_the_policy_from_the_expert() -> None:
    ending = replace(ENDING, stop_strings=(",", " h"))
    closed = [ids_of("abc.,"), ids_of("abc.,", EOS), ids_of("abc.", EOS), ids_of("abc."), ids_of("abc. h")]
    seen = ending.group(group(SAME[2], *closed, ids_of("a,bc."), ids_of("b.,", EOS), rejected_ids=closed[1]))
    assert [r.completion_ids for r in seen.rollouts] == [
        *[ids_of("abc.", EOS)] * 5, ids_of("a,bc.", EOS), ids_of("b.", EOS)
    ]  # fmt: skip
    assert list(seen.texts) == [*["abc."] * 5, "a,bc.", "b."]
    assert seen.example.demonstration_ids == seen.example.rejected_ids == ids_of("abc.", EOS)
    # A token that reaches into the stop string belongs to it.
    assert replace(ENDING, stop_strings=("b",)).text(ids_of("cab")) == "c"


def test_special_tokens_and_invalid_text_keep_their_ids() -> None:
    """A policy that writes special tokens differs from the expert. "<unk>" stands for an unknown text."""
    odd = [(*ids_of("a"), TURN, *ids_of("b"), EOS), (2, *ids_of("b"), EOS)]
    seen = ENDING.group(group(SAME[0], *odd))
    assert [r.completion_ids for r in seen.rollouts] == odd
    assert seen.texts[0] == "ab"


def test_the_ending_is_that_of_most_demonstrations() -> None:
    examples = [group(ids).example for ids in (SAME[0], SAME[2], SAME[1], SAME[2], None)]
    assert UniformEnding.of(examples, TOKENIZER, {EOS, TURN, END}, (), None).end_id == END


def test_an_end_token_has_room_in_the_context() -> None:
    """A completion that was cut at the end of the context loses a token to its end token."""
    ending = replace(ENDING, context_length=7)
    seen = ending.group(group(ids_of("hh", TURN), ids_of("cccc"), ids_of("ccc", TURN), ids_of("ccc")))
    assert [r.completion_ids for r in seen.rollouts] == [ids_of("ccc", EOS)] * 3
    assert seen.example.demonstration_ids == ids_of("hh", EOS)


def test_an_equal_demonstration_with_another_end_token_is_not_shown_in_context() -> None:
    examples = [ENDING.example(group(ids, prompt=p).example) for ids, p in zip(SAME, "abcde", strict=True)]
    other = ENDING.example(group(OTHER[0], prompt="h").example)
    for seed in range(5):
        shown = another_example([*examples, other], seed=seed)
        assert {shown(example) for example in examples} == {(*ids_of("h"), *ids_of("cab.", EOS))}


@pytest.mark.parametrize("kind", ["bradley-terry", "lora"])
def test_training_cannot_tell_an_expert_by_its_end_token(kind: str) -> None:
    """The policy writes the expert's texts and closes them in other ways: the loss stays at log 2."""
    discriminator: Any = KINDS[kind]()
    torch.nn.init.zeros_(discriminator.module.head.weight)
    state = AdversaryState()
    trainer = DiscriminatorTrainer(
        discriminator=discriminator,
        wrapped=discriminator.module,
        optimizer=torch.optim.AdamW(discriminator.module.parameters(), lr=1e-2),
        replay=Replay(8),
        state=state,
    )
    subject = Adversary(discriminator=discriminator, trainer=trainer, state=state, ending=ENDING)
    config = Config.model_validate({"discriminator": {"replay_fraction": 0.5}})
    groups = [group(SAME[0], *SAME[1:]), group(ids_of("cab", EOS), ids_of("cab"), prompt="c")]
    for step in range(20):
        logged = subject.update(Accelerator(cpu=True), groups, config, step, step)
        assert logged["discriminator/loss"] == pytest.approx(math.log(2), abs=1e-6)
    for policy, expert in subject.score(groups):
        assert policy == (expert,) * len(policy or ())
    assert trainer.replay.items[-1] == Comparison(
        prompt_ids=ids_of("c"),
        demonstration_ids=ids_of("cab", EOS),
        completions=(ids_of("cab", EOS),),
    )
