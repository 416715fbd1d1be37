"""The Bradley-Terry discriminator: scores, loss, training, replay and the accuracy band."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch.testing import assert_close

from support.comparisons import COMPARISONS, sequences
from support.tiny import make_model
from uniapl.discriminator import Candidate
from uniapl.discriminator.bradley_terry import (
    AdversaryState,
    BradleyTerryDiscriminator,
    Comparison,
    Replay,
    ScoreModel,
    another_example,
    no_context,
)
from uniapl.errors import UsageError
from uniapl.models.packing import can_pack
from uniapl.models.policy import decoder_layers
from uniapl.training.update.discriminator_step import discriminator_step
from uniapl.types import Example, Rollout, RolloutGroup


def discriminator(max_tokens: int = 10_000, *, family: str = "qwen3") -> BradleyTerryDiscriminator:
    module = ScoreModel.copy_of(make_model(family))
    torch.manual_seed(3)
    with torch.no_grad():
        module.head.weight.normal_()
    return BradleyTerryDiscriminator(module=module, pad_id=0, max_tokens=max_tokens)


def test_an_untrained_discriminator_gives_equal_logits() -> None:
    fresh = BradleyTerryDiscriminator(module=ScoreModel.copy_of(make_model()), pad_id=0, max_tokens=100)
    assert fresh.logits(sequences()) == [0.0] * 9


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_logit_is_the_head_on_the_last_token_s_hidden_state(family: str) -> None:
    subject = discriminator(family=family)
    for (prompt, completion), logit in zip(sequences(), subject.logits(sequences()), strict=True):
        with torch.no_grad():
            hidden = subject.module.trunk(torch.tensor([prompt + completion])).last_hidden_state
            expected = float(subject.module.head(hidden[0, -1]))
        assert logit == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_copy_of_the_first_layers_reads_their_states(family: str, packed: bool) -> None:
    """The last norm and the head on the state behind layer 1 of 2; the policy keeps both layers."""
    model = make_model(family)
    module = ScoreModel.copy_of(model, num_layers=1)
    with torch.no_grad():
        module.head.weight.normal_()
    packed = packed and can_pack(module.trunk)
    subject = BradleyTerryDiscriminator(module=module, pad_id=0, max_tokens=10_000, packed=packed)
    children = dict(model.base_model.named_children())
    norm = children.get("norm") or children["ln_f"]
    for (prompt, completion), logit in zip(sequences(), subject.logits(sequences()), strict=True):
        with torch.no_grad():
            states = model.base_model(torch.tensor([prompt + completion]), output_hidden_states=True)
            # hidden_states starts with the embeddings.
            expected = float(module.head(norm(states.hidden_states[1])[0, -1]))
        assert logit == pytest.approx(expected, abs=1e-4)
    one, two = (sum(p.numel() for p in trunk.parameters()) for trunk in (module.trunk, model.base_model))
    layer = sum(p.numel() for p in decoder_layers(model.base_model)[1].parameters())
    assert (one, two) == (two - layer, one + layer)
    assert model.config.num_hidden_layers == 2


def test_more_layers_than_the_model_has_are_refused() -> None:
    with pytest.raises(UsageError, match="num_layers 3: the model has 2 decoder layers"):
        ScoreModel.copy_of(make_model(), num_layers=3)


@pytest.mark.parametrize("max_tokens", [1, 12, 30])
def test_logits_do_not_depend_on_the_batch(max_tokens: int) -> None:
    assert discriminator(max_tokens).logits(sequences()) == pytest.approx(
        discriminator().logits(sequences()), abs=1e-4
    )


def test_the_last_token_is_found_by_length() -> None:
    """A completion may end with the pad token, which is often the end token."""
    subject = discriminator()
    ends_with_pad = [((5, 6), (7, 0)), ((5, 6), (7, 8, 9))]
    alone = [subject.logits([sequence])[0] for sequence in ends_with_pad]
    assert subject.logits(ends_with_pad) == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("max_tokens", [1, 25, 10_000])
def test_the_loss_is_bradley_terry_over_all_pairs(max_tokens: int) -> None:
    subject = discriminator(max_tokens)
    total = sum(losses()["pairs"].item() for losses in subject.losses(COMPARISONS))
    logits = iter(discriminator().logits(sequences()))
    expected = 0.0
    for comparison in COMPARISONS:
        expert = next(logits)
        for _ in comparison.completions:
            expected -= torch.nn.functional.logsigmoid(torch.tensor(expert - next(logits))).item()
    assert total == pytest.approx(expected, rel=1e-4)


def gradients(max_tokens: int) -> list[torch.Tensor]:
    subject = discriminator(max_tokens)
    optimizer = torch.optim.SGD(subject.module.parameters(), lr=1.0)
    before = [p.detach().clone() for p in subject.module.parameters()]
    discriminator_step(
        Accelerator(cpu=True), subject, subject.module, optimizer, COMPARISONS, max_grad_norm=1e9
    )
    return [b - p.detach() for b, p in zip(before, subject.module.parameters(), strict=True)]


def test_the_update_does_not_depend_on_the_batches() -> None:
    expected = gradients(10_000)
    assert max(g.abs().max() for g in expected) > 0.1
    for got, want in zip(gradients(1), expected, strict=True):
        assert_close(got, want, atol=1e-5, rtol=1e-3)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone() -> None:
    subject = discriminator()
    with torch.no_grad():
        subject.module.head.weight[0, 0] = float("nan")
    before = [p.detach().clone() for p in subject.module.parameters()]
    optimizer = torch.optim.AdamW(subject.module.parameters(), lr=1.0)
    loss, applied = discriminator_step(
        Accelerator(cpu=True), subject, subject.module, optimizer, COMPARISONS, max_grad_norm=1.0
    )
    assert not applied
    assert loss != loss
    for got, want in zip(subject.module.parameters(), before, strict=True):
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("unpaired", [False, True])
def test_no_comparisons_still_run_a_backward_pass(unpaired: bool) -> None:
    """A rank without comparisons must take part in the gradient synchronisation."""
    subject = replace(discriminator(), unpaired=unpaired)
    (losses,) = [compute() for compute in subject.losses([])]
    assert losses.keys() == subject.counts([]).keys()
    loss = sum(losses.values(), torch.zeros(()))
    loss.backward()
    assert loss.item() == 0.0
    assert subject.module.head.weight.grad is not None
    assert not subject.module.head.weight.grad.any()


def test_it_learns_to_distinguish_two_habits() -> None:
    """Demonstrations contain a 7, completions a 9: held-out pairs are distinguished after 40 updates."""
    module = ScoreModel.copy_of(make_model(scale=1.0))
    subject = BradleyTerryDiscriminator(module=module, pad_id=0, max_tokens=10_000)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[Comparison]:
        def ids(habit: int) -> tuple[int, ...]:
            return (*torch.randint(20, 60, (3,), generator=generator).tolist(), habit, 20)

        return [
            Comparison(prompt_ids=ids(5), demonstration_ids=ids(7), completions=(ids(9), ids(9)))
            for _ in range(count)
        ]

    held_out = draw(50)

    def accuracy() -> float:
        logits = subject.logits([s for c in held_out for s in c.sequences])
        expert, policy = logits[0::3], zip(logits[1::3], logits[2::3], strict=True)
        wins = [e > p for e, pair in zip(expert, policy, strict=True) for p in pair]
        return sum(wins) / len(wins)

    before = accuracy()
    for _ in range(40):
        discriminator_step(Accelerator(cpu=True), subject, module, optimizer, draw(8), max_grad_norm=1.0)
    assert before < 0.7
    assert accuracy() > 0.95


def test_replay_drops_the_oldest_and_draws_by_seed() -> None:
    replay = Replay(2)
    replay.add(COMPARISONS[:2])
    replay.add(COMPARISONS[2:])
    assert replay.items == COMPARISONS[1:]
    assert len(replay.draw(5, seed=0)) == 2
    assert replay.draw(1, seed=1) == replay.draw(1, seed=1)
    restored = Replay(2)
    restored.load(json.loads(json.dumps(replay.state())))
    assert restored.items == replay.items
    empty = Replay(0)
    empty.add(COMPARISONS)
    assert empty.items == []


def test_the_accuracy_band_pauses_and_goes_on() -> None:
    state = AdversaryState()
    for _ in range(40):
        state.observe(accuracy=1.0, expert_logit=2.0, band=(0.6, 0.9))
    assert state.paused
    assert state.expert_mean == pytest.approx(2.0)
    state.observe(accuracy=0.5, expert_logit=None, band=(0.6, 0.9))
    assert state.paused, "inside the band it stays as it is"
    for _ in range(40):
        state.observe(accuracy=0.5, expert_logit=None, band=(0.6, 0.9))
    assert not state.paused


def test_a_rejected_completion_is_compared_too() -> None:
    rollout = Rollout(
        completion_ids=(9, 9), sampling_logprobs=(-1.0, -1.0), finish_reason="stop", policy_version=0
    )
    settings = {"row": 1, "prompt": "p", "prompt_ids": (5,), "demonstration": "d", "columns": {}}
    for rejected, completions in ((None, ((9, 9),)), ((3, 1), ((9, 9), (3, 1)))):
        example = Example(**settings, demonstration_ids=(7, 1), rejected_ids=rejected)
        group = RolloutGroup(example=example, rollouts=(rollout,), reward_parts={})
        assert Comparison.of(group, no_context).completions == completions


def test_another_example_shows_the_expert_and_never_the_answer_itself() -> None:
    def example(prompt: int, demonstration: int | None) -> Example:
        ids = None if demonstration is None else (demonstration, 1)
        return Example(
            row=1, prompt="p", prompt_ids=(prompt,), demonstration="d", demonstration_ids=ids, columns={}
        )

    examples = [example(5, 10), example(6, 11), example(7, 12), example(8, None)]
    context = another_example(examples, seed=0)
    shown = {(5, 10, 1), (6, 11, 1), (7, 12, 1)}
    for one in [*examples, *(example(n, 20) for n in range(9, 30))]:
        assert context(one) in shown
        assert context(one)[0] != one.prompt_ids[0]
        assert context(one) == another_example(examples, seed=0)(one)
    assert {context(example(n, None)) for n in range(9, 30)} == shown
    for seed in range(8):
        shared = another_example([example(5, 10), example(6, 10), example(7, 12)], seed=seed)
        assert shared(example(5, 10)) == (7, 12, 1), "6 has the same answer, which would give it away"
    with pytest.raises(UsageError, match="two different prompts"):
        another_example(examples[:1] * 2, seed=0)

    subject = replace(discriminator(), context=context)
    candidate = Candidate(example=examples[0], completion_ids=(9, 9), text="", reference=None)
    assert subject.score([candidate]) == subject.logits([((*context(examples[0]), 5), (9, 9))])
    rollout = Rollout(
        completion_ids=(9, 9), sampling_logprobs=(-1.0, -1.0), finish_reason="stop", policy_version=0
    )
    group = RolloutGroup(example=examples[0], rollouts=(rollout,), reward_parts={})
    assert Comparison.of(group, context).prompt_ids == (*context(examples[0]), 5)
