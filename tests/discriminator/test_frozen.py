"""POLAR's format and scores, the density ratio, and runs with either."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, Qwen3Config

import uniapl
from support.candidates import CANDIDATES, candidate, polar_tokenizer
from support.runs import lines, recipe, run_until, timeless, train
from support.tiny import SMALL, make_model, save_model
from uniapl.discriminator.density_ratio import DensityRatio
from uniapl.discriminator.polar import END, SEPARATOR, Polar, PolarFormat
from uniapl.models.policy import Policy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def polar_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("polar")
    torch.manual_seed(5)
    config = Qwen3Config(**{**SMALL, "vocab_size": 70}, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(path)
    polar_tokenizer().save_pretrained(path)
    return path


def load(path: Path, max_tokens: int = 10_000) -> Polar:
    return Polar.load(str(path), trust_remote_code=False, max_tokens=max_tokens, device=CPU)


def test_polar_s_format_token_by_token() -> None:
    """prompt, line break, reference, separator, prompt, line break, candidate, end."""
    tokenizer = polar_tokenizer()
    separator, end = tokenizer.convert_tokens_to_ids([SEPARATOR, END])
    spell = tokenizer.encode
    expected = [*spell("hi\n"), *spell("ab"), separator, *spell("hi\n"), *spell("cde"), end]
    shown = PolarFormat(tokenizer=tokenizer)
    assert tokenizer.encode(shown.text("hi", "ab", "cde")) == expected
    turns = [{"role": "system", "content": "h"}, {"role": "user", "content": "i"}]
    assert shown.text(turns, "ab", "cde") == f"h\ni\nab{SEPARATOR}h\ni\ncde{END}"


def test_polar_s_truncation() -> None:
    """Completions keep their last tokens, then the prompt does; the format itself takes four tokens."""
    shown = PolarFormat(tokenizer=polar_tokenizer(), max_length=15, max_response_length=3)
    text = shown.text("abcdefgh", "12345".translate(str.maketrans("12345", "vwxyz")), "ABCD")
    assert text == f"gh\nxyz{SEPARATOR}gh\nBCD{END}", "(15 - 4 - 3 - 3) // 2 = 2 tokens of the prompt"
    assert len(polar_tokenizer().encode(text)) == 14
    full = PolarFormat(tokenizer=polar_tokenizer(), max_length=10, max_response_length=3)
    assert full.text("abc", "xyz", "BCD") == f"\nxyz{SEPARATOR}\nBCD{END}", "no room is left for the prompt"


def test_what_is_encoded_fits_the_model_s_window(polar_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(polar_dir, tmp_path / "begins")
    begins = polar_tokenizer()
    backend: Any = begins.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<turn> $A", special_tokens=[("<turn>", 3)])
    begins.save_pretrained(tmp_path / "begins")
    for directory, length in ((polar_dir, 128), (tmp_path / "begins", 127)):
        shown = PolarFormat.load(str(directory), trust_remote_code=False)
        assert (shown.max_length, shown.max_response_length) == (length, length // 4)
        ids = shown.tokenizer.encode(shown.text("a" * 300, "b" * 300, "c" * 300))
        assert 126 <= len(ids) <= 128
        assert ids.count(shown.tokenizer.convert_tokens_to_ids("c")) == length // 4


def test_polar_scores_are_the_model_s_at_the_end_token(polar_dir: Path) -> None:
    polar = load(polar_dir)
    tokenizer = polar_tokenizer()
    for one, score in zip(CANDIDATES, polar.score(CANDIDATES), strict=True):
        prompt = str(one.example.prompt)
        ids = tokenizer.encode(f"{prompt}\naaa{SEPARATOR}{prompt}\n{one.text}{END}")
        with torch.no_grad():
            hidden = polar.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            assert score == pytest.approx(float(polar.model.score(hidden)), abs=1e-4)
    assert len({round(score, 3) for score in polar.score(CANDIDATES)}) == 4


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_scores_do_not_depend_on_the_batch(polar_dir: Path, max_tokens: int) -> None:
    ratio = density_ratio(max_tokens)
    for subject in (load(polar_dir, max_tokens), ratio):
        alone = [subject.score([one])[0] for one in CANDIDATES]
        assert subject.score(CANDIDATES) == pytest.approx(alone, abs=1e-4)
        assert subject.score(CANDIDATES[::-1]) == pytest.approx(alone[::-1], abs=1e-4)
        assert subject.score([]) == []


def test_polar_needs_a_reference_and_its_own_tokens(polar_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(uniapl.UniAPLError, match="row 1 has no demonstration"):
        load(polar_dir).score([candidate("a", demonstration=None)])
    save_model(tmp_path / "policy")
    with pytest.raises(uniapl.UsageError, match=r"has no token '<\|reward\|>'"):
        load(tmp_path / "policy")
    with pytest.raises(uniapl.UsageError, match="cannot load the tokenizer"):
        load(tmp_path / "nowhere")


def density_ratio(max_tokens: int = 10_000) -> DensityRatio:
    expert, start = Policy(make_model(seed=1)), Policy(make_model(seed=2))
    return DensityRatio(
        expert=expert, reference=start, pad_id=0, max_tokens=max_tokens, packed=True, device=CPU
    )


def test_density_ratio_by_hand() -> None:
    """The mean difference of the log-probabilities, computed one completion token at a time."""
    expert, start = make_model(seed=1), make_model(seed=2)
    for one, score in zip(CANDIDATES, density_ratio().score(CANDIDATES), strict=True):
        ids = [*one.example.prompt_ids, *one.completion_ids]
        begin = len(one.example.prompt_ids)
        total = 0.0
        with torch.no_grad():
            for position in range(begin, len(ids)):
                for model, sign in ((expert, 1), (start, -1)):
                    logits = model(torch.tensor([ids[:position]])).logits[0, -1].double()
                    total += sign * float(logits[ids[position]] - logits.logsumexp(-1))
        assert score == pytest.approx(total / len(one.completion_ids), abs=1e-4)


def test_density_ratio_reads_padded_rows_by_their_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 40 tokens per batch, also for rows that share a prompt."""
    read: list[tuple[int, int]] = []
    forward = Policy.forward

    def seen(self: Policy, input_ids: torch.Tensor, *rest: Any) -> Any:
        read.append((input_ids.numel(), len(input_ids)))
        return forward(self, input_ids, *rest)

    monkeypatch.setattr(Policy, "forward", seen)
    same = Policy(make_model(seed=1))
    subject = DensityRatio(expert=same, reference=same, pad_id=0, max_tokens=40, packed=False, device=CPU)
    subject.score(CANDIDATES * 5)
    assert max(rows for _, rows in read) > 1
    assert all(tokens <= 40 or rows == 1 for tokens, rows in read)


def test_density_ratio_of_a_model_with_itself_is_zero() -> None:
    same = Policy(make_model(seed=1))
    subject = DensityRatio(expert=same, reference=same, pad_id=0, max_tokens=100, packed=True, device=CPU)
    assert subject.score(CANDIDATES) == [0.0] * 4


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("polar", {}), ("density-ratio", {}), ("density-ratio", {"density_ratio_reference": "policy"})],
)
def test_a_run_against_a_frozen_discriminator_resumes_exactly(
    kind: str, settings: dict[str, Any], polar_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    expert = polar_dir if kind == "polar" else save_model(tmp_path / "expert", seed=7)
    adversary = {"kind": kind, "model_name_or_path": str(expert), **settings}
    values = {"method": "a-grpo", "discriminator": adversary, "max_steps": 4, "save_steps": 2}
    train(recipe(model_dir, tmp_path / "whole", **values))
    records = lines(tmp_path / "whole" / "metrics.jsonl")
    assert [record["weight/lambda_adv"] for record in records] == [2.0] * 4, "it needs no warm-up"
    win_rates = [
        (line["demonstration"] is not None, answer["win_rate"])
        for line in lines(tmp_path / "whole" / "completions.jsonl")
        for answer in line["completions"]
    ]
    assert all((u is not None) == (demonstrated or kind != "polar") for demonstrated, u in win_rates[12:])
    assert len({u for _, u in win_rates if u is not None}) > 4
    assert not (tmp_path / "whole" / "checkpoints" / "step-000004" / "discriminator.safetensors").exists()
    run_until(3, recipe(model_dir, tmp_path / "broken", **values))
    train(recipe(model_dir, tmp_path / "broken", resume="auto", **values))
    assert timeless(lines(tmp_path / "broken" / "metrics.jsonl")) == timeless(records)


def test_errors_of_a_frozen_discriminator_s_settings(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(uniapl.UsageError, match=r"'polar' needs discriminator.model_name_or_path"):
        train(recipe(model_dir, tmp_path / "run", discriminator={"kind": "polar"}))
    values = recipe(model_dir, tmp_path / "other")
    train(values)
    changed = {"kind": "density-ratio", "model_name_or_path": str(model_dir)}
    with pytest.raises(uniapl.UsageError, match=r"the recipe has 'density-ratio'"):
        train(values | {"resume": "auto", "max_steps": 6, "discriminator": changed})
