"""Discriminators on the reference's states: cold start, resume, processes, adapters, held-out texts."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from support.processes import run_processes
from support.runs import assert_same_run, lines, recipe, run_until, timeless, train
from support.tiny import make_tokenizer
from uniapl.config import Config, DiscriminatorConfig
from uniapl.discriminator.bradley_terry import AdversaryState
from uniapl.discriminator.head import StateHead
from uniapl.models.token_states import TokenStates
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.demonstration_states import DemonstrationStates
from uniapl.training.inputs import RunInputs
from uniapl.training.state_adversary import HeadTrainer, StateAdversary, build_state_adversary
from uniapl.types import Example, Rollout, RolloutGroup

KINDS = ("head", "reference-likelihood")


def scheduled(model: Path, output: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """Two cold-start steps on demonstrations, then four with rollouts; the KL reference is taken between."""
    objective = {
        "mu_peak": 1.0,
        "mu_valley": 0.1,
        "mu_decay_steps": 0,
    }
    objective |= {"lambda_adv": 1.0, "adversarial_placement": "multiply", "pass_threshold": 0.2}
    discriminator = {"kind": kind, "warmup_steps": 0, "min_accuracy": 0.0, "learning_rate": 1e-2}
    batching = {"cold_start_steps": 2, "cold_start_demonstrations_per_step": 6}
    return recipe(
        model,
        output,
        **{
            "max_steps": 6,
            "save_steps": 3,
            "objective": objective | {"beta": 0.05},
            "discriminator": discriminator,
            "batching": batching,
        }
        | changes,
    )


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind."""
    folder = tmp_path_factory.mktemp(request.param)
    train(scheduled(model_dir, folder / "run", request.param))
    (folder / "kind").write_text(request.param)
    return folder


def test_the_cold_start_samples_nothing_and_the_rest_multiplies(run: Path) -> None:
    records = lines(run / "run" / "metrics.jsonl")
    assert [record["tokens/rollout"] > 0 for record in records] == [False, False, True, True, True, True]
    assert [record["weight/mu"] for record in records] == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1])
    # No prompt of the third step has a demonstration, and no earlier one gave its mean logit.
    # In the fifth step no rollout with a demonstration has a reward that could be multiplied.
    assert [record["adversary/active"] for record in records] == [0, 0, 0, 1, 0, 1]
    assert ["discriminator/win_rate" in record for record in records] == [False] * 3 + [True] * 3
    assert [record.get("kl") is not None for record in records] == [False, False, True, True, True, True]
    changed = [record["adversary/reward_change"] for record in records if "adversary/reward_change" in record]
    assert sum(changed) > 0
    # Six demonstrations of three letters and the end token each in a cold-start step, five after it.
    assert [record["tokens/sft"] for record in records] == [24, 24, 20, 20, 20, 20]


def test_resume_is_exact(run: Path, model_dir: Path, tmp_path: Path) -> None:
    kind = (run / "kind").read_text()
    values = scheduled(model_dir, tmp_path / "run", kind)
    run_until(5 - 2, values)
    train(values | {"resume": "auto"})
    mine, theirs = (timeless(lines(path / "run" / "metrics.jsonl")) for path in (tmp_path, run))
    assert mine == theirs
    sentence = "the adversary acted in 2 of 4 steps with rollouts; it changed rewards by "
    cards = [(path / "run" / "final" / "README.md").read_text() for path in (tmp_path, run)]
    assert sentence in cards[0]
    assert cards[0] == cards[1]
    if kind == "head":
        assert_same_run(tmp_path / "run", run / "run", 6)


def _train(folder: Path, launch: dict[str, str], values: dict[str, Any]) -> None:
    os.environ |= launch
    train(values)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "launch"),
    [(2, {}), (4, {}), (2, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})],
    ids=["2 by DDP", "4 by DDP", "2 by FSDP2"],
)
def test_several_processes_give_the_same_run(
    run: Path, model_dir: Path, tmp_path: Path, world: int, launch: dict[str, str]
) -> None:
    kind = (run / "kind").read_text()
    values = scheduled(model_dir, tmp_path / "run", kind)
    assert run_processes(world, _train, tmp_path, launch, values) == [0] * world
    mine, theirs = (timeless(lines(path / "run" / "metrics.jsonl")) for path in (tmp_path, run))
    for one, other in zip(mine, theirs, strict=True):
        for name in ("reward", "loss", "kl", "adversary/reward_change", "discriminator/win_rate"):
            expected = other.get(name)
            assert one.get(name) == (expected and pytest.approx(expected, rel=1e-4, abs=1e-6)), name
    if kind == "head":
        heads = [
            load_file(checkpoint.checkpoint_path(path / "run", 6) / "discriminator.safetensors")
            for path in (tmp_path, run)
        ]
        for name, tensor in heads[1].items():
            torch.testing.assert_close(heads[0][name], tensor, atol=1e-4, rtol=1e-3)


def test_with_an_adapter_the_reference_is_the_base(model_dir: Path, tmp_path: Path) -> None:
    """Before its first update an adapter changes nothing: the first scores are those of the whole model."""
    changes = {"max_steps": 1, "save_steps": 1, "batching": {"cold_start_steps": 0}}
    changes["objective"] = {"reference_step": 0, "mu_peak": 0.1}
    records = []
    for name, model in {"whole": {}, "lora": {"lora_r": 2}}.items():
        values = scheduled(model_dir, tmp_path / name, "head")
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) else value
        values["model"] = values["model"] | model
        train(values)
        records += lines(tmp_path / name / "metrics.jsonl")
    assert records[0]["discriminator/loss"] == pytest.approx(records[1]["discriminator/loss"], rel=1e-4)
    assert records[0]["reward"] == records[1]["reward"]


def test_without_a_kl_the_start_is_read(model_dir: Path, tmp_path: Path) -> None:
    values = scheduled(model_dir, tmp_path / "run", "head")
    values["objective"] |= {"beta": 0.0}
    train(values)
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["adversary/active"] for record in records] == [0, 0, 0, 1, 0, 1]
    assert all(record.get("kl") is None for record in records)


@pytest.mark.parametrize("used", [True, False])
def test_the_log_probability_is_a_feature_unless_it_is_switched_off(
    used: bool, model_dir: Path, tmp_path: Path
) -> None:
    """Also without mismatched negatives, the head is measured on mismatched demonstrations."""
    values = scheduled(model_dir, tmp_path / "run", "head")
    values["discriminator"] |= {"log_probability_features": used, "mismatched_demonstrations": 0}
    train(values)
    weights = load_file(checkpoint.checkpoint_path(tmp_path / "run", 6) / "discriminator.safetensors")
    assert weights["project.weight"].shape[1] == len(weights["norm.weight"]) + used
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert any("discriminator/held_out_mismatched_accuracy" in record for record in records)


def demonstrated(count: int) -> list[Example]:
    return [
        Example(
            row=n,
            prompt=f"p{n}",
            prompt_ids=(n,),
            demonstration=f"d{n}",
            demonstration_ids=(100 + n, 1),
            columns={},
        )
        for n in range(count)
    ]


def states_of(
    examples: list[Example], read: list[Any], held_out: set[int], num_mismatched: int = 3
) -> DemonstrationStates:
    def reader(sequences: Any) -> list[TokenStates]:
        read.append([tokens.pair for tokens in sequences])
        return [TokenStates(logprobs=torch.zeros(1), states=torch.zeros(1, 2)) for _ in sequences]

    return DemonstrationStates(
        examples, held_out=lambda e: e.row in held_out, read=reader, seed=0, num_mismatched=num_mismatched
    )


def test_mismatches_are_of_other_prompts_and_held_out_texts_are_never_learned() -> None:
    read: list[Any] = []
    subject = states_of(demonstrated(12), read, {3, 7, 9})
    for example in (*subject.train, *subject.held_out, *subject.train):
        subject.of(example)
    assert len(read) == 12, "each example is read once"
    for sequences in read:
        (prompt, own), *others = sequences
        assert own == (100 + prompt[0], 1)
        assert all(at == prompt for at, _ in others)
        rows = {ids[0] - 100 for _, ids in others}
        assert prompt[0] not in rows
        if prompt[0] in {3, 7, 9}:
            assert rows == {3, 7, 9} - {prompt[0]}
        else:
            assert len(rows) == 3
            assert not rows & {3, 7, 9}


@pytest.mark.parametrize(("number", "trained"), [(0, 0), (1, 1), (5, 5)])
def test_what_is_measured_does_not_depend_on_what_is_trained(number: int, trained: int) -> None:
    """Without mismatched negatives, held-out examples still have mismatched demonstrations."""
    held_out = {3, 7, 9, 10}
    read: list[Any] = []
    subject = states_of(demonstrated(14), read, held_out, number)
    for example in (*subject.train, *subject.held_out):
        assert len(subject.of(example).mismatched) == (3 if example.row in held_out else trained)
    assert {example.row for example in subject.measured} == held_out
    # Without held-out examples, the training's own are measured.
    everything = states_of(demonstrated(14), read, set(), number)
    assert everything.measured == everything.train
    assert len(everything.of(everything.train[0]).mismatched) == max(3, trained)


def test_states_do_not_depend_on_what_was_read_before() -> None:
    first: list[Any] = []
    second: list[Any] = []
    forward, backward = states_of(demonstrated(8), first, set()), states_of(demonstrated(8), second, set())
    for example in forward.train:
        forward.of(example)
    for example in reversed(backward.train):
        backward.of(example)
    assert first == second[::-1]


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    subject = states_of(demonstrated(8), read, set())
    # An example has four completions of one token with a log-probability and two states in fp32.
    monkeypatch.setattr("uniapl.training.demonstration_states.CACHE_BYTES", 2 * 4 * 3 * 4)
    for row in (0, 1, 0, 2, 0, 1):
        subject.of(subject.train[row])
    assert [sequences[0][0][0] for sequences in read] == [0, 1, 2, 1]


def likelihood() -> StateAdversary:
    """The likelihood; token 1 ends."""
    return StateAdversary(
        trainer=None,
        likelihood_scale=4.0,
        text_length=lambda tokens: (
            tokens.num_written - (tokens.is_written[-1] and tokens.completion[-1] == 1)
        ),
        max_tokens=100,
        state=AdversaryState(),
        accelerator=Accelerator(cpu=True),
    )


def group(example: Example, *completions: tuple[int, ...]) -> RolloutGroup:
    return RolloutGroup(
        example=example,
        rollouts=tuple(
            Rollout(
                completion_ids=ids,
                sampling_logprobs=(0.0,) * len(ids),
                finish_reason="stop",
                policy_version=0,
            )
            for ids in completions
        ),
        reward_parts={},
    )


def states(*logprobs: list[float]) -> list[TokenStates]:
    return [TokenStates(logprobs=torch.tensor(x), states=torch.zeros(len(x), 0)) for x in logprobs]


def test_the_likelihood_is_the_scaled_mean_without_the_end_token() -> None:
    shown, bare = demonstrated(2)
    bare = replace(bare, demonstration_ids=None)
    subject = likelihood()
    found = subject.score(
        [group(shown, (8, 9, 1), (8, 9)), group(bare, (7, 1))],
        [states([-0.5, -1.0, -7.0], [-0.5, -1.0], [-1.0, -9.0]), states([-0.25, -3.0])],
    )
    # Both completions have the same text; the first one's end token, with -7 nats, is not read.
    assert found == [((-3.0, -3.0), -4.0), ((-1.0,), None)]
    # The first token and the last two are given: one end token is a tool's, and there is none of the policy.
    rollout = replace(group(shown, (7, 8, 1, 5, 1)).rollouts[0], given=((0, 1), (3, 5)))
    trajectory = replace(group(shown), rollouts=(rollout,))
    found = subject.score([trajectory], [states([-0.5, -1.5], [-1.0, -9.0])])
    assert found == [((-4.0,), -4.0)]


def test_what_closed_a_completion_does_not_change_its_likelihood() -> None:
    """An end token, a stop string, both, or the length limit, next to the run's own stop strings."""
    missing: Any = None
    tokenizer = make_tokenizer()
    inputs = RunInputs(
        source=missing,
        tokenizer=tokenizer,
        dataset=missing,
        rewarder=missing,
        stop_ids=frozenset({1}),
        data_sha256="",
    )
    values = {"discriminator": {"kind": "reference-likelihood"}, "rollout": {"stop_strings": [",."]}}
    subject = build_state_adversary(
        Config.model_validate(values), missing, inputs, Accelerator(cpu=True), missing
    )
    (shown,) = demonstrated(1)
    texts = [tuple(tokenizer(text).input_ids) for text in ("ab", "ab,.")]
    completions = [(*ids, *end) for ids in texts for end in ((), (1,))]
    given = [states([-0.5, -1.5, *[-9.0] * (len(ids) - 2)])[0] for ids in completions]
    ((policy, expert),) = subject.score([group(shown, *completions)], [[*given, *states([-1.0, -9.0])]])
    assert policy is not None
    assert set(policy) == {expert}


def test_a_text_without_tokens_is_never_the_expert_s() -> None:
    """Its mean would be 0, the highest of all: the policy would learn to write nothing."""
    (shown,) = demonstrated(1)
    ((policy, expert),) = likelihood().score([group(shown, (1,))], [states([-0.1], [-1.0, -9.0])])
    assert policy is not None
    assert expert == -4.0
    assert policy[0] < expert - 100


def test_before_the_reference_exists_nothing_is_scored() -> None:
    (shown,) = demonstrated(1)
    assert likelihood().score([group(shown, (8, 1))], None) == [(None, None)]


def test_a_checkpoint_keeps_whether_the_discriminator_is_accurate(tmp_path: Path) -> None:
    """Between the two limits the accuracy alone does not decide."""
    for accurate in (True, False):
        saved = likelihood()
        saved.state = AdversaryState(accuracy=0.52, accurate=accurate)
        loaded = likelihood()
        loaded.load(tmp_path, json.loads(json.dumps(saved.save(tmp_path))))
        loaded.state.compare_accuracy(0.55)
        assert loaded.state == saved.state


def test_a_logit_that_is_not_finite_does_not_reach_the_running_mean() -> None:
    (shown,) = demonstrated(1)
    subject = likelihood()
    scored = [replace(group(shown, (8, 1)), expert_logit=logit) for logit in (float("nan"), -2.0, None)]
    subject.observe(scored, {}, DiscriminatorConfig())
    assert subject.state.expert_mean == -2.0


def test_an_update_of_the_head_that_does_not_fit_is_done_in_smaller_parts(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(scheduled(model_dir, tmp_path / "whole", "head"))
    forward, sizes = StateHead.forward, list[int]()

    def small(self: Any, states: torch.Tensor, *others: Any) -> Any:
        if torch.is_grad_enabled():
            sizes.append(states.shape[0])
            if states.shape[0] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, states, *others)

    monkeypatch.setattr(StateHead, "forward", small)
    train(scheduled(model_dir, tmp_path / "small", "head"))
    assert max(sizes) > 2
    assert max(sizes[-8:]) <= 2, "it tried, and then knew"
    whole, parts = (lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "small"))
    for mine, other in zip(parts, whole, strict=True):
        loss = other.get("discriminator/loss")
        assert mine.get("discriminator/loss") == (loss and pytest.approx(loss, rel=1e-3))


@pytest.mark.parametrize(
    ("settings", "num_mismatched"),
    [({}, 1), ({"mismatched_demonstrations": 1}, 1), ({"mismatched_demonstrations": 0}, 0)],
)
def test_the_head_learns_from_passing_rollouts_and_from_mismatched_demonstrations(
    settings: dict[str, Any], num_mismatched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = demonstrated(4)
    subject = likelihood()
    known = states_of(examples, [], set())
    unused: Any = None
    vars(subject)["trainer"] = HeadTrainer(
        module=unused, wrapped=unused, optimizer=unused, demonstrations=known
    )
    given: list[Any] = []

    def record(*arguments: Any, counts: dict[str, int], **_: Any) -> tuple[float, bool]:
        given.append((*arguments[3:], counts))
        return 1.0, True

    monkeypatch.setattr("uniapl.training.state_adversary.head_step", record)
    scored = replace(
        group(examples[0], (8, 1), (9, 1), (7, 1)),
        reward_parts={"check": (1.0, 0.5, None)},
        policy_logits=(0.0, 0.0, 0.0),
    )
    subject.fresh = [states([-0.1], [-0.2], [-0.3])]
    config = Config.model_validate(
        {"discriminator": {"kind": "head", "held_out_fraction": 0.0, "updates_per_step": 1, **settings}}
    )
    found = subject.update(Accelerator(cpu=True), [scored], config, step=3, stage_step=3)
    ((experts, negatives, counts),) = given
    passing, *mismatched = negatives
    # The failing and the unknown rollout are no negatives.
    assert passing.logprobs.tolist() == pytest.approx([-0.1])
    assert (len(experts), len(mismatched)) == (1, num_mismatched)
    assert counts == {"expert": 1, "negative": 1 + num_mismatched}
    assert found == {"discriminator/loss": 1.0, "discriminator/updates": 1, "discriminator/skipped": 0}
    failed = replace(scored, reward_parts={"check": (0.0, 0.0, 0.0)})
    subject.fresh = [states([-0.1], [-0.2], [-0.3])]
    found = subject.update(Accelerator(cpu=True), [failed], config, step=4, stage_step=4)
    # Demonstrations without a negative would only raise every logit.
    assert found["discriminator/updates"] == num_mismatched
