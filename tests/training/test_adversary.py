"""The adversary by hand: whose logits are whose, what an update is trained on, and the sizes of its parts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import GenerationConfig

from support.processes import run_processes
from support.runs import assert_same_run, lines, recipe, run_until, train
from support.tiny import letter_rows, make_model, make_tokenizer, save_model
from uniapl import UniAPLError
from uniapl.config import Config
from uniapl.data.streams import is_held_out
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
from uniapl.discriminator.demonstrations import Demonstrations
from uniapl.discriminator.ending import UniformEnding
from uniapl.training import adversary as adversary_module
from uniapl.training.adversary import Adversary, DiscriminatorTrainer
from uniapl.training.checkpoint.directory import checkpoint_path
from uniapl.training.update.accumulate import OutOfMemoryError
from uniapl.types import Example, Rollout, RolloutGroup, derive_seed

ENDING = UniformEnding(tokenizer=make_tokenizer(), stop_ids={1}, end_id=1)


def spelled(text: str) -> tuple[int, ...]:
    return (*make_tokenizer()(text).input_ids, 1)


def group(
    prompt: str, demonstration: str | None, *completions: str, rejected: str | None = None
) -> RolloutGroup:
    example = Example(
        row=1,
        prompt=prompt,
        prompt_ids=spelled(prompt)[:-1],
        demonstration=demonstration,
        demonstration_ids=None if demonstration is None else spelled(demonstration),
        rejected_ids=None if rejected is None else spelled(rejected),
        columns={},
    )
    rollouts = tuple(
        Rollout(
            completion_ids=spelled(text),
            sampling_logprobs=(-1.0,) * (len(text) + 1),
            finish_reason="stop",
            policy_version=0,
        )
        for text in completions
    )
    return RolloutGroup(example=example, rollouts=rollouts, texts=completions, reward_parts={})


@dataclass(frozen=True)
class ByLength:
    """The logit is the length of the text; it is noted what was scored, and with which reference."""

    seen: list[tuple[str, str | None]]
    needs_reference: ClassVar[bool] = False

    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        self.seen.extend((c.text, c.reference) for c in candidates)
        return [float(len(c.text)) for c in candidates]


class ByReference(ByLength):
    needs_reference: ClassVar[bool] = True


GROUPS = [
    group("p", "aaaa", "b", "cc"),
    group("q", None, "ddd", "e"),
    group("r", "ff", "aaaaa", "ff"),
]


def test_the_logits_of_rollouts_and_demonstrations_are_not_swapped() -> None:
    seen: list[tuple[str, str | None]] = []
    subject = Adversary(discriminator=ByLength(seen), trainer=None, state=AdversaryState(), ending=ENDING)
    assert subject.score(GROUPS) == [((1.0, 2.0), 4.0), ((3.0, 1.0), None), ((5.0, 2.0), 2.0)]
    assert seen == [
        ("b", "aaaa"),
        ("cc", "aaaa"),
        ("ddd", None),
        ("e", None),
        ("aaaaa", "ff"),
        ("ff", "ff"),
        ("aaaa", "aaaa"),
    ]
    assert subject.score([]) == []


def test_a_discriminator_that_needs_a_reference_skips_prompts_without_one() -> None:
    seen: list[tuple[str, str | None]] = []
    subject = Adversary(discriminator=ByReference(seen), trainer=None, state=AdversaryState(), ending=ENDING)
    assert subject.score(GROUPS) == [((1.0, 2.0), 4.0), (None, None), ((5.0, 2.0), 2.0)]
    assert ("ddd", None) not in seen


@dataclass
class Recorded:
    """What was drawn from the replay and passed to the updates, in order."""

    adversary: Adversary
    updates: list[list[Comparison]]

    def update(self, groups: Sequence[RolloutGroup], step: int, stage_step: int = 10, **settings: Any) -> Any:
        self.updates.clear()
        return self.adversary.update(Accelerator(cpu=True), groups, config_of(**settings), step, stage_step)


def config_of(seed: int = 0, **settings: Any) -> Config:
    return Config.model_validate({"seed": seed, "discriminator": settings})


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """An adversary whose updates are noted and not run; their losses are 1, 2, 3, ..."""
    module = ScoreModel.copy_of(make_model())
    discriminator = BradleyTerryDiscriminator(module=module, pad_id=0, max_tokens=100)
    state, updates = AdversaryState(), list[list[Comparison]]()
    trainer = DiscriminatorTrainer(
        discriminator=discriminator,
        wrapped=module,
        optimizer=torch.optim.SGD(module.parameters()),
        replay=Replay(100),
        state=state,
    )

    def noted(self: Any, accelerator: Any, comparisons: Sequence[Comparison], config: Any) -> Any:
        updates.append(list(comparisons))
        return float(len(updates)), len(updates) != 2

    monkeypatch.setattr(DiscriminatorTrainer, "update", noted)
    subject = Adversary(discriminator=discriminator, trainer=trainer, state=state, ending=ENDING)
    return Recorded(adversary=subject, updates=updates)


def demonstrated(*prompts: str) -> list[RolloutGroup]:
    return [group(prompt, "aa", "b", "c") for prompt in prompts]


def comparisons(groups: Sequence[RolloutGroup]) -> list[Comparison]:
    return [Comparison.of(item, no_context) for item in groups]


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.25, 2), (0.5, 6), (0.6, 9), (0.75, 18)])
def test_the_replay_is_this_fraction_of_an_update(fraction: float, count: int, recorded: Recorded) -> None:
    """n fresh comparisons and m replayed ones with m / (n + m) = replay_fraction."""
    older = demonstrated(*"abcdefghijklmnopqrst")
    recorded.update(older, 0)
    fresh = demonstrated(*"uvwxyz")
    recorded.update(fresh, 1, replay_fraction=fraction, updates_per_step=3)
    assert len(recorded.updates) == 3
    draws = []
    for number, update in enumerate(recorded.updates):
        assert update[:6] == comparisons(fresh)
        drawn = update[6:]
        draws.append(drawn)
        assert len(drawn) == count == len({c.prompt_ids for c in drawn})
        assert all(c in comparisons(older) for c in drawn)
        replay = Replay(100)
        replay.add(comparisons(older))
        assert drawn == replay.draw(count, seed=derive_seed(0, "replay", 1, number))
    assert count in (0, 18) or draws[0] != draws[1], "each update draws by itself"


def test_a_comparison_is_replayed_only_in_later_steps(recorded: Recorded) -> None:
    """The replay is drawn from before the step's own comparisons enter it."""
    first, second = demonstrated("a", "b"), demonstrated("c", "d")
    recorded.update(first, 0, replay_fraction=0.5, updates_per_step=2)
    assert recorded.updates == [comparisons(first)] * 2
    recorded.update(second, 1, replay_fraction=0.5, updates_per_step=1)
    ((*fresh, third, fourth),) = recorded.updates
    assert fresh == comparisons(second)
    assert sorted([third, fourth], key=str) == sorted(comparisons(first), key=str)
    assert recorded.adversary.trainer is not None
    assert recorded.adversary.trainer.replay.items == comparisons([*first, *second])


def test_an_update_s_log_and_which_groups_it_uses(recorded: Recorded) -> None:
    groups = [*demonstrated("a"), group("b", None, "c"), group("d", "ee", "f", rejected="gg")]
    logged = recorded.update(groups, 0, updates_per_step=4)
    used = comparisons([groups[0], groups[2]])
    assert recorded.updates == [used] * 4
    assert used[1].completions == (spelled("f"), spelled("gg"))
    assert logged == {
        "discriminator/loss": 2.5,
        "discriminator/updates": 3,
        "discriminator/skipped": 1,
        "discriminator/paused": 0,
    }
    nothing = recorded.update([groups[1]], 1, replay_fraction=0.5)
    assert nothing["discriminator/loss"] is None
    assert nothing["discriminator/updates"] == 0
    assert recorded.updates == [], "without a fresh comparison none is replayed"


def test_held_out_prompts_are_never_in_an_update_or_in_the_replay(recorded: Recorded) -> None:
    groups = demonstrated(*"abcdefghijklmnopqrst")
    settings = {"held_out_fraction": 0.4, "replay_fraction": 0.5, "updates_per_step": 1}
    trained = [item for item in groups if not is_held_out(item.example, config_of(**settings))]
    assert 5 < len(trained) < 17
    for step in range(2):
        recorded.update(groups, step, **settings)
        assert recorded.updates[0][: len(trained)] == comparisons(trained)
        assert all(c in comparisons(trained) for c in recorded.updates[0])


def with_different_demonstrations(subject: Recorded, *, unpaired: bool) -> list[RolloutGroup]:
    """Groups of 20 prompts, each with its own demonstration; those not held out are the trainer's."""
    groups = [group(prompt, prompt * 3, "b", "c") for prompt in "adefghijklmnopqrstuv"]
    groups = [replace(g, example=replace(g.example, row=row)) for row, g in enumerate(groups)]
    known = [g.example for g in groups if not is_held_out(g.example, config_of(held_out_fraction=0.4))]
    assert 5 < len(known) < 17
    trainer: Any = subject.adversary.trainer
    vars(trainer)["demonstrations"] = Demonstrations(known, seed=0)
    vars(trainer)["discriminator"] = replace(trainer.discriminator, unpaired=unpaired)
    return groups


MISMATCHED = {"held_out_fraction": 0.4, "mismatched_demonstrations": 2, "updates_per_step": 2}


def test_mismatched_demonstrations_are_further_negatives_of_a_pair(recorded: Recorded) -> None:
    groups = with_different_demonstrations(recorded, unpaired=False)
    trained = [g.example for g in groups if not is_held_out(g.example, config_of(**MISMATCHED))]
    shown = {example.demonstration_ids for example in trained}
    steps: list[list[Comparison]] = []
    for step in (0, 1, 0):
        assert recorded.adversary.trainer is not None
        recorded.adversary.trainer.replay.items = []
        recorded.update(groups, step, **MISMATCHED)
        first, second = recorded.updates
        assert first == second, "drawn once per step, so that a replayed comparison is an old one"
        assert recorded.adversary.trainer.replay.items == first
        steps.append(first)
        for comparison, example in zip(first, trained, strict=True):
            *rollouts, one, other = comparison.completions
            assert rollouts == [spelled("b"), spelled("c")]
            assert comparison.demonstration_ids == example.demonstration_ids
            assert {one, other} <= shown - {example.demonstration_ids}
            assert one != other
    assert steps[0] == steps[2] != steps[1]


def test_an_unpaired_update_has_all_rollouts_and_drawn_demonstrations(recorded: Recorded) -> None:
    groups = with_different_demonstrations(recorded, unpaired=True)
    config = config_of(**MISMATCHED)
    trained = {g.example.demonstration_ids: g.example for g in groups if not is_held_out(g.example, config)}
    # Two prompts of the step: one that is held out, and one without a demonstration.
    held_out = next(g for g in groups if is_held_out(g.example, config))
    bare = group("w", None, "x", "yy", rejected="zz")
    bare = next(
        g
        for g in (replace(bare, example=replace(bare.example, prompt_ids=(n, n))) for n in range(20, 40))
        if not is_held_out(g.example, config)
    )
    recorded.update([held_out, bare], 0, **MISMATCHED)
    for rollouts, drawn in recorded.updates:
        assert rollouts == Comparison(
            prompt_ids=bare.example.prompt_ids,
            demonstration_ids=None,
            completions=(spelled("x"), spelled("yy")),
        )
        example = trained[drawn.demonstration_ids]
        assert drawn.prompt_ids == example.prompt_ids
        assert len({*drawn.completions} & (trained.keys() - {example.demonstration_ids})) == 2
        assert len(drawn.completions) == 2
    assert recorded.updates[0][1] != recorded.updates[1][1], "each update draws by itself"
    assert recorded.adversary.trainer is not None
    assert recorded.adversary.trainer.replay.items == [recorded.updates[0][0]]
    recorded.update([bare], 1, replay_fraction=0.5, **MISMATCHED)
    for update in recorded.updates:
        assert [c.demonstration_ids is None for c in update] == [True, True, False, False]


def negatives(model: Path, output: Path, loss: str, **changes: Any) -> dict[str, Any]:
    settings = {"loss": loss, "mismatched_demonstrations": 2, "held_out_fraction": 0.2}
    return recipe(model, output, max_steps=4, save_steps=2, discriminator=settings, **changes)


@pytest.fixture(scope="module", params=["paired", "unpaired"])
def run(request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with mismatched negatives, in which half of the prompts have no demonstration."""
    folder = tmp_path_factory.mktemp(request.param)
    train(negatives(model_dir, folder / request.param, request.param))
    return folder / request.param


def test_a_run_with_mismatched_negatives_resumes_exactly(run: Path, model_dir: Path, tmp_path: Path) -> None:
    values = negatives(model_dir, tmp_path / "run", run.name)
    run_until(2, values)
    train(values | {"resume": "auto"})
    assert_same_run(tmp_path / "run", run, 4)


@pytest.mark.parametrize("loss", ["paired", "unpaired"])
def test_a_run_s_updates_never_have_a_held_out_demonstration(
    loss: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[Comparison] = []

    def recorded_update(self: Any, accelerator: Any, comparisons: Sequence[Comparison], config: Any) -> Any:
        compared.extend(comparisons)
        return 0.5, True

    monkeypatch.setattr(DiscriminatorTrainer, "update", recorded_update)
    rows = letter_rows(26, demonstrated=range(26))
    values = negatives(model_dir, tmp_path / "run", loss)
    train(values, train_dataset=rows)
    config = Config.model_validate({"discriminator": values["discriminator"]})
    texts = {spelled(row["completion"]): group(row["prompt"], "b").example for row in rows}
    held_out = {ids for ids, example in texts.items() if is_held_out(example, config)}
    assert 2 < len(held_out) < 13
    experts = {ids for comparison in compared for ids in comparison.expert}
    mismatched = [sum(ids in texts for ids in comparison.completions) for comparison in compared]
    assert len(experts) > 5
    assert any(not comparison.expert for comparison in compared) == (loss == "unpaired")
    assert max(mismatched) >= 2
    read = {ids for comparison in compared for ids in comparison.completions}
    assert not (read | experts) & held_out


def test_a_checkpoint_of_the_other_loss_can_be_resumed(run: Path, model_dir: Path, tmp_path: Path) -> None:
    values = negatives(model_dir, tmp_path / "run", run.name)
    run_until(2, values)
    other = "paired" if run.name == "unpaired" else "unpaired"
    train(negatives(model_dir, tmp_path / "run", other) | {"resume": "auto"})
    updates = [record["discriminator/updates"] for record in lines(tmp_path / "run" / "metrics.jsonl")]
    # The prompts of the last step have no demonstration.
    assert updates[2:] == ([2, 2] if other == "unpaired" else [2, 0])


def _train(folder: Path, launch: dict[str, str], values: dict[str, Any]) -> None:
    os.environ |= launch
    train(values)


@pytest.mark.distributed
@pytest.mark.parametrize("run", ["unpaired"], indirect=True)
@pytest.mark.parametrize(
    "launch", [{}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}], ids=["ddp", "fsdp2"]
)
def test_two_processes_train_on_the_same_negatives(
    run: Path, model_dir: Path, tmp_path: Path, launch: dict[str, str]
) -> None:
    values = negatives(model_dir, tmp_path / "run", run.name)
    assert run_processes(2, _train, tmp_path, launch, values) == [0, 0]
    mine, theirs = (lines(path / "metrics.jsonl") for path in (tmp_path / "run", run))
    for one, other in zip(mine, theirs, strict=True):
        for name in ("loss", "discriminator/loss", "discriminator/accuracy", "discriminator/win_rate"):
            expected = other.get(name)
            assert one.get(name) == (expected and pytest.approx(expected, rel=1e-4, abs=1e-5)), name
    weights = [
        load_file(checkpoint_path(path, 4) / "discriminator.safetensors") for path in (tmp_path / "run", run)
    ]
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, atol=1e-4, rtol=1e-3)


def test_a_frozen_or_paused_discriminator_is_not_trained_but_fills_its_replay(recorded: Recorded) -> None:
    groups = demonstrated("a")
    assert recorded.update(groups, 0, 4, freeze_after_steps=5)["discriminator/updates"] > 0
    assert recorded.update(groups, 1, 5, freeze_after_steps=5)["discriminator/updates"] == 0
    assert recorded.updates == []
    recorded.adversary.state.paused = True
    logged = recorded.update(groups, 2)
    assert (logged["discriminator/updates"], logged["discriminator/paused"]) == (0, 1)
    assert recorded.adversary.trainer is not None
    assert len(recorded.adversary.trainer.replay.items) == 3


def test_what_is_observed_are_the_finite_logits_and_the_right_accuracy() -> None:
    subject = Adversary(discriminator=ByLength([]), trainer=None, state=AdversaryState(), ending=ENDING)
    groups = [replace(GROUPS[0], expert_logit=x) for x in (1.0, None, float("nan"), 4.0)]
    pairs = {"discriminator/accuracy": 1.0, "discriminator/held_out_accuracy": 0.0}
    subject.observe(groups, pairs, config_of().discriminator)
    assert subject.state.accuracy == pytest.approx(0.55)
    assert subject.state.expert_mean == pytest.approx(2.5)
    subject.observe(groups[:1], pairs, config_of(held_out_fraction=0.5).discriminator)
    assert subject.state.accuracy == pytest.approx(0.9 * 0.55)
    assert subject.state.expert_mean == pytest.approx(2.5 + 0.1 * (1.0 - 2.5))
    before = replace(subject.state)
    subject.observe(groups[1:3], {}, config_of().discriminator)
    assert subject.state == before


def test_the_band_pauses_above_and_resumes_below() -> None:
    band = (0.4, 0.6)
    for accuracy, before, after in (
        (0.61, False, True),
        (0.6, False, False),
        (0.5, True, True),
        (0.4, True, True),
        (0.39, True, False),
    ):
        state = AdversaryState(accuracy=accuracy, paused=before)
        state.observe(accuracy=None, expert_logit=None, band=band)
        assert state.paused is after, accuracy


def test_batches_that_do_not_fit_are_halved_down_to_one_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    def step(*args: Any, max_grad_norm: float, max_tokens: int) -> tuple[float, bool]:
        limits.append(max_tokens)
        assert max_grad_norm == 3.0
        if max_tokens > fits:
            raise OutOfMemoryError
        return 0.5, True

    monkeypatch.setattr(adversary_module, "discriminator_step", step)
    module = ScoreModel.copy_of(make_model())
    trainer = DiscriminatorTrainer(
        discriminator=BradleyTerryDiscriminator(module=module, pad_id=0, max_tokens=100),
        wrapped=module,
        optimizer=torch.optim.SGD(module.parameters()),
        replay=Replay(0),
        state=AdversaryState(),
    )
    config = Config.model_validate(
        {"discriminator": {"max_grad_norm": 3.0}, "batching": {"max_tokens_per_micro_batch": 1000}}
    )
    given = comparisons([group("pp", "a" * 7, *"bcdefgh")])
    # The longest sequence has 10 tokens: 8 sequences of a pair's 20 tokens are 160.
    fits = 50
    assert trainer.update(Accelerator(cpu=True), given, config) == (0.5, True)
    assert limits == [1000, 80, 40]
    assert trainer.state.max_tokens == 40
    limits.clear()
    trainer.update(Accelerator(cpu=True), given, config)
    assert limits == [40], "the size that fitted is kept"
    fits = 0
    with pytest.raises(UniAPLError, match="a pair of 20 tokens does not fit"):
        trainer.update(Accelerator(cpu=True), given, config)


def test_a_run_s_contexts_and_comparisons_have_one_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with two end tokens, both in demonstrations."""
    path = save_model(tmp_path / "model")
    GenerationConfig(eos_token_id=[1, 3]).save_pretrained(path)
    shown: list[Example] = []
    compared: list[Comparison] = []

    def recorded_context(examples: Sequence[Example], seed: int) -> Any:
        shown.extend(examples)
        return another_example(examples, seed)

    def recorded_update(self: Any, accelerator: Any, comparisons: Sequence[Comparison], config: Any) -> Any:
        compared.extend(comparisons)
        return 0.5, True

    monkeypatch.setattr(adversary_module, "another_example", recorded_context)
    monkeypatch.setattr(DiscriminatorTrainer, "update", recorded_update)
    rows = [
        {"prompt": f"say {letter}", "letter": letter, "completion": letter + end}
        for letter, end in zip("abcdefgh", ["", "<turn>", "", "", "<turn>", "", "", ""], strict=True)
    ]
    train(
        recipe(path, tmp_path / "run", max_steps=2, discriminator={"in_context_demonstration": True}),
        train_dataset=rows,
    )
    assert [ids and (len(ids), ids[-1]) for ids in (e.demonstration_ids for e in shown)] == [(2, 1)] * 8
    assert len(compared) >= 6
    for comparison in compared:
        assert 3 not in comparison.prompt_ids
        for _, ids in comparison.sequences:
            assert ids[-1] == 1
            assert not {1, 3} & set(ids[:-1])
