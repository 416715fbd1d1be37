"""Runs with preference pairs: what they learn, resume, processes, memory, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from support.processes import run_processes
from support.runs import assert_same_run, has_letter, lines, recipe, run_until, timeless, train
from support.tiny import letter_rows, make_tokenizer
from uniapl.config import Config
from uniapl.data.rows import Dataset
from uniapl.errors import UsageError
from uniapl.models.policy import Policy
from uniapl.models.token_states import TokenReader, TokenStates
from uniapl.training.preflight.checks import notes_on_pairs

PAIRS = [
    {"prompt": row["prompt"], "chosen": row["letter"] * 3, "rejected": "no" * (n % 3 + 1)}
    for n, row in enumerate(letter_rows())
]


ROWS = letter_rows(demonstrated=range(1, 12))
"""Every step has a prompt with a demonstration, and one step a prompt without."""


def with_pairs(model: Path, output: Path, **changes: Any) -> dict[str, Any]:
    objective = {"pref_weight": 0.5, "beta_pref": 0.5, **changes.pop("objective", {})}
    return recipe(model, output, objective=objective, **changes)


def dpo(model: Path, output: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "method": "dpo",
        "output_dir": str(output),
        "max_steps": 4,
        "save_steps": 2,
        "model": {"model_name_or_path": str(model)},
        "optim": {"learning_rate": 1e-2},
        "batching": {"demonstrations_per_step": 6, "max_tokens_per_micro_batch": 60},
    }
    return {**values, **changes}


def metrics(run: Path) -> list[dict[str, Any]]:
    return timeless(lines(run / "metrics.jsonl"))


def assert_close_runs(got: Path, expected: Path) -> None:
    for one, other in zip(metrics(got), metrics(expected), strict=True):
        names = ["loss", "loss/pref", "rewards/margins", "tokens/pref", "grad_norm"]
        # While the policy is the reference, rounding decides the sign of each margin.
        names += ["rewards/accuracies"] if abs(other["rewards/margins"]) > 1e-3 else []
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


def test_pairs_of_the_data_do_not_make_way_for_prompts_that_never_pass(
    model_dir: Path, tmp_path: Path
) -> None:
    """With informative prompts, whose rows are no pairs."""
    rows = [{**row, "completion": f"{row['letter']}a"} for row in letter_rows()]
    rows += [{"prompt": f"say {x}", "chosen": x, "rejected": "no", "letter": "a"} for x in "bcd"]
    found: list[list[int]] = []
    for selection in ("uniform", "informative"):
        values = recipe(
            model_dir,
            tmp_path / selection,
            objective={"pref_weight": 1.0, "pref_pairs": "rejected"},
            batching={"prompt_selection": selection, "demonstrations_per_step": 15},
        )
        train(
            values, train_dataset=rows, reward_functions=[lambda completions, **_: [0.0] * len(completions)]
        )
        found.append([r["tokens/pref"] for r in lines(tmp_path / selection / "metrics.jsonl")])
    assert found[0] == found[1]
    assert min(found[0]) > 0


def test_dpo_prefers_the_chosen_completions(model_dir: Path, tmp_path: Path) -> None:
    """Without rewards and rollouts. The policy is its own reference at first: margin 0 and loss log 2."""
    unpaired = {"prompt": "say z.", "completion": "zzz"}
    equal = {"prompt": "say y.", "chosen": "yyy", "rejected": "yyy"}
    values = dpo(model_dir, tmp_path / "run", max_steps=20)
    train(values, train_dataset=[unpaired, *PAIRS, equal], reward_functions=[])
    records = metrics(tmp_path / "run")
    assert records[0]["loss"] == records[0]["loss/pref"] == pytest.approx(math.log(2), rel=1e-6)
    assert records[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert records[-1]["loss/pref"] < 0.3
    assert records[-1]["rewards/accuracies"] == 1.0
    assert records[-1]["rewards/margins"] > 1.0
    assert records[-1]["rewards/chosen"] > records[-1]["rewards/rejected"]
    for record in records:
        assert (record["tokens/sft"], record["tokens/rollout"]) == (0, 0)
        # Of 6 pairs: 4 tokens of each chosen one, and 3, 5 or 7 of each rejected one, with the end token.
        assert 6 * (4 + 3) <= record["tokens/pref"] <= 6 * (4 + 7)
    # The 12 rows with a pair are one epoch.
    assert records[1]["epoch"] == pytest.approx(1.0)
    assert records[1]["tokens/pref"] + records[0]["tokens/pref"] == 12 * 4 + 4 * (3 + 5 + 7)


@pytest.fixture(scope="module")
def run(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations against rollouts, next to all other components."""
    folder = tmp_path_factory.mktemp("pairs") / "run"
    train(with_pairs(model_dir, folder), train_dataset=ROWS)
    return folder


def test_rollouts_are_compared_with_demonstrations(run: Path) -> None:
    records = metrics(run)
    assert records[0]["loss/pref"] == pytest.approx(math.log(2), rel=1e-6)
    assert records[-1]["loss/pref"] != pytest.approx(math.log(2), rel=1e-3)
    for record, groups in zip(records, _by_step(run), strict=True):
        demonstrated = [group for group in groups if group["demonstration"]]
        assert record["tokens/pref"] == sum(
            group["demonstration_tokens"]
            for group in demonstrated
            if any(rollout["reward"] < 1 for rollout in group["completions"])
        )
        weights = {"sft": "weight/mu", "rl": "weight/rl", "adv": "weight/lambda_adv"}
        parts = [record[key] * (record[f"loss/{name}"] or 0.0) for name, key in weights.items()]
        parts += [0.05 * record["loss/kl"], 0.5 * (record["loss/pref"] or 0.0)]
        assert record["loss"] == pytest.approx(sum(parts), abs=1e-5)
    assert any(not group["demonstration"] for groups in _by_step(run) for group in groups)


def _by_step(run: Path) -> list[list[dict[str, Any]]]:
    steps: dict[int, list[dict[str, Any]]] = {}
    for line in lines(run / "completions.jsonl"):
        steps.setdefault(line["step"], []).append(line)
    return [steps[step] for step in sorted(steps)]


def test_resume_is_exact(run: Path, model_dir: Path, tmp_path: Path) -> None:
    values = with_pairs(model_dir, tmp_path / "run")
    run_until(3, values, train_dataset=ROWS)
    train(values | {"resume": "auto"}, train_dataset=ROWS)
    assert_same_run(tmp_path / "run", run, 4)


@pytest.mark.parametrize("changes", [{"max_tokens_per_micro_batch": 30}, {"packing": False}])
def test_micro_batches_do_not_change_the_run(
    run: Path, model_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    train(with_pairs(model_dir, tmp_path / "run", batching=changes), train_dataset=ROWS)
    assert_close_runs(tmp_path / "run", run)


def test_a_pair_that_does_not_fit_with_others_is_split_off(
    run: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two updates, so that the old log-probabilities are split too."""
    objective = {"num_iterations": 2}
    train(with_pairs(model_dir, tmp_path / "whole", objective=objective), train_dataset=ROWS)
    forward = Policy.forward

    def small(self: Policy, input_ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        if len(input_ids) > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, input_ids, *args, **options)

    monkeypatch.setattr(Policy, "forward", small)
    train(with_pairs(model_dir, tmp_path / "run", objective=objective), train_dataset=ROWS)
    assert_close_runs(tmp_path / "run", tmp_path / "whole")


def _train(folder: Path, values: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    rewards = {} if "letter" in rows[0] else {"reward_functions": []}
    train(values, train_dataset=rows, **rewards)


@pytest.mark.distributed
def test_two_processes_give_the_same_run(run: Path, model_dir: Path, tmp_path: Path) -> None:
    values = with_pairs(model_dir, tmp_path / "run")
    assert run_processes(2, _train, tmp_path, values, ROWS) == [0, 0]
    assert_close_runs(tmp_path / "run", run)
    _train(tmp_path, dpo(model_dir, tmp_path / "one"), PAIRS)
    assert run_processes(2, _train, tmp_path, dpo(model_dir, tmp_path / "two"), PAIRS) == [0, 0]
    assert_close_runs(tmp_path / "two", tmp_path / "one")


def test_the_reference_reads_each_completion_once(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rollouts and demonstrations of a step in one pass, which KL, discriminator and pairs share."""
    read, calls = TokenReader.read, []

    def counted(self: TokenReader, sequences: Any) -> list[TokenStates]:
        calls.append(list(sequences))
        return read(self, sequences)

    monkeypatch.setattr(TokenReader, "read", counted)
    values = recipe(model_dir, tmp_path / "run", max_steps=2)
    values["objective"] |= {"pref_weight": 0.5, "adversarial_placement": "multiply"}
    values["discriminator"] = {"kind": "reference-likelihood"}
    train(values, train_dataset=letter_rows(demonstrated=range(12)))
    assert [len(sequences) for sequences in calls] == [3 * (4 + 1)] * 2


def test_there_are_no_pairs_before_the_reference(model_dir: Path, tmp_path: Path) -> None:
    objective = {"reference_step": 2, "beta": 0.0}
    train(with_pairs(model_dir, tmp_path / "run", objective=objective), train_dataset=ROWS)
    records = metrics(tmp_path / "run")
    assert [record["tokens/pref"] for record in records[:2]] == [0, 0]
    assert [record["loss/pref"] for record in records[:2]] == [None, None]
    assert records[2]["loss/pref"] == pytest.approx(math.log(2), rel=1e-6)
    assert records[2]["kl"] is None


def test_the_data_s_pairs_next_to_the_other_components(model_dir: Path, tmp_path: Path) -> None:
    """The pairs of the rows that are drawn as demonstrations, which all enter the SFT loss."""
    rows = [row | ({"rejected": "no"} if n % 4 == 0 else {}) for n, row in enumerate(letter_rows())]
    values = with_pairs(model_dir, tmp_path / "run", objective={"pref_pairs": "rejected"})
    train(values, train_dataset=rows)
    records = metrics(tmp_path / "run")
    assert records[0]["loss/pref"] == pytest.approx(math.log(2), rel=1e-6)
    # 5 of the 6 demonstrations have 4 tokens each; 3 of the 6 have a pair, of 4 + 3 tokens.
    assert records[0]["tokens/sft"] == 20
    assert records[0]["tokens/pref"] in (14, 21)


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_the_reference_reads_only_what_is_used(
    beta: float, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a KL, the pairs of the data: three times a letter, or "no"."""
    read: list[str] = []
    original = TokenReader.read

    def watched(self: TokenReader, sequences: Any) -> list[TokenStates]:
        read.extend(str(make_tokenizer().decode(list(completion))) for _, completion, _ in sequences)
        return original(self, sequences)

    monkeypatch.setattr(TokenReader, "read", watched)
    rows = [row | ({"rejected": "no"} if n % 4 == 0 else {}) for n, row in enumerate(letter_rows())]
    objective = {"pref_pairs": "rejected", "beta": beta}
    train(with_pairs(model_dir, tmp_path / "run", objective=objective), train_dataset=rows)
    pairs = {"no<eos>", *(row["completion"] + "<eos>" for row in rows if "rejected" in row)}
    assert pairs <= {*read}
    assert ({*read} == pairs) == (beta == 0)


def test_settings_of_pairs_without_a_weight_are_noted() -> None:
    def stage(**objective: Any) -> Config:
        return Config.model_validate({"objective": objective})

    unused = stage(pref_pairs="rejected", beta_pref=0.5)
    assert notes_on_pairs([stage(), unused, unused], Dataset(examples=())) == [
        "objective.pref_pairs has no effect: objective.pref_weight is 0",
        "objective.beta_pref has no effect: objective.pref_weight is 0",
    ]
    assert notes_on_pairs([stage(), stage()], Dataset(examples=())) == []
    assert notes_on_pairs([unused, stage(pref_weight=1.0)], Dataset(examples=())) == []


def test_what_is_refused_before_training(model_dir: Path, tmp_path: Path) -> None:
    def refused(values: dict[str, Any], match: str, rows: list[dict[str, Any]]) -> None:
        with pytest.raises(UsageError, match=match):
            train(values, train_dataset=rows, reward_functions=[has_letter])

    grpo = {"method": "grpo", "objective": {"pref_weight": 1.0}, "discriminator": {}}
    values = {**recipe(model_dir, tmp_path / "run"), **grpo}
    refused(values, "no sampled prompt has one: add a 'completion'", letter_rows(demonstrated=()))
    rows = letter_rows(demonstrated=range(12))
    refused(dpo(model_dir, tmp_path / "run"), "no row has 'chosen' and a different 'rejected'", rows)
    equal = [row | {"rejected": row["completion"]} for row in rows]
    another = "no row has 'chosen' and a different 'rejected'.*use another method with objective.pref_weight"
    refused(dpo(model_dir, tmp_path / "run"), another, equal)
    both = with_pairs(model_dir, tmp_path / "run", objective={"pref_pairs": "rejected"})
    refused(both, "or set objective.pref_pairs to rollouts", equal)
    gate = {"mu_controller": "gate", "pref_pairs": "rejected"}
    refused(with_pairs(model_dir, tmp_path / "run", objective=gate), "mu_controller 'gate' draws none", rows)
    assert not (tmp_path / "run").exists()


def test_a_reference_that_comes_too_late_is_reported(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(with_pairs(model_dir, tmp_path / "run", max_steps=1, objective={"reference_step": 1, "beta": 0.0}))
    text = " ".join("".join(capsys.readouterr()).split())
    assert "no preference pair is used: objective.reference_step 1 is not below max_steps 1" in text
