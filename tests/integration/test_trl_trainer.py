"""The example that puts UniAPL's parts into TRL's trainer: its rewards, loss and samples, by hand."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support.runs import has_letter
from support.tiny import letter_rows

pytest.importorskip("trl")
EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_trainer.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trl_trainer", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reward(completions: list[str], letter: list[str], **_: Any) -> list[float]:
    return has_letter(completions, letter)


def build(example: ModuleType, model_dir: Path, folder: Path, **settings: Any) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig

    rows = [
        {"prompt": row["prompt"], "letter": row["letter"], "demonstration": row["letter"] * 3}
        for row in letter_rows()
    ]
    config = GRPOConfig(
        output_dir=str(folder),
        max_steps=3,
        beta=0.1,
        num_generations=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_completion_length=6,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_dropout=True,
        bf16=False,
        save_strategy="no",
    )
    return example.MixedTrainer(
        model=str(model_dir),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        args=config,
        **settings,
    )


def mean_logprob(model: Any, tokenizer: Any, prompt: str, completion: list[int], temperature: float) -> float:
    prompt_ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + completion])).logits[0] / temperature
    logprobs = logits.log_softmax(-1)
    kept = completion[:-1] if completion[-1] == tokenizer.eos_token_id else completion
    return sum(float(logprobs[len(prompt_ids) - 1 + i, t]) for i, t in enumerate(kept)) / len(kept)


def test_rewards_are_multiplied_by_the_likelihood_s_u(
    example: ModuleType, model_dir: Path, tmp_path: Path
) -> None:
    trainer = build(example, model_dir, tmp_path, exponent=2.0)
    tokenizer = trainer.processing_class
    inputs = [{"prompt": "say a.", "letter": "a", "demonstration": "aaa"}] * 2
    texts = ["aaa", "ab"]
    ids = [[*tokenizer(texts[0])["input_ids"], tokenizer.eos_token_id], tokenizer(texts[1])["input_ids"]]
    found = trainer._calculate_rewards(inputs, ["say a."] * 2, texts, ids)
    likelihood = [
        4.0 * mean_logprob(trainer.ref_model, tokenizer, "say a.", completion, trainer.temperature)
        for completion in (ids[0], ids[1], [*tokenizer("aaa")["input_ids"], tokenizer.eos_token_id])
    ]
    u = [float(torch.sigmoid(torch.tensor(d - likelihood[2]))) for d in likelihood[:2]]
    # The first passes (reward 1); the second keeps at most half of its reward.
    assert found.flatten().tolist() == pytest.approx([u[0] ** 2, 0.5 * min(u[1] ** 2, 0.5)], rel=1e-4)


def test_the_loss_is_trls_mixed_with_the_demonstrations_nll(
    example: ModuleType, model_dir: Path, tmp_path: Path
) -> None:
    seen: list[tuple[float, float]] = []
    for mu in (0.0, 0.3):
        trainer = build(example, model_dir, tmp_path, mu=mu)
        trainer.train()
        first = next(entry for entry in trainer.state.log_history if "loss" in entry)
        seen.append((first["loss"], first["sft/nll"]))
        assert trainer.state.global_step == 3
        nll = [entry["sft/nll"] for entry in trainer.state.log_history if "sft/nll" in entry]
    (plain, expected_nll), (mixed, same_nll) = seen
    assert same_nll == pytest.approx(expected_nll, rel=1e-4)
    # TRL logs the sum over the two micro-batches; each adds half of its nll.
    assert mixed == pytest.approx(0.7 * plain + 0.3 * same_nll, abs=2e-3)
    assert nll[-1] < nll[0]


def test_the_sampler_gives_one_completion_per_row_and_its_log_probabilities(
    example: ModuleType, model_dir: Path, tmp_path: Path
) -> None:
    trainer = build(example, model_dir, tmp_path)
    found = example.sample(["say a.", "say a.", "say bc."], trainer)
    assert found["prompt_ids"] == [
        trainer.processing_class(p)["input_ids"] for p in ("say a.", "say a.", "say bc.")
    ]
    model = trainer.model
    for prompt, completion, logprobs in zip(
        *(found[k] for k in ("prompt_ids", "completion_ids", "logprobs")), strict=True
    ):
        assert 1 <= len(completion) == len(logprobs) <= 6
        with torch.no_grad():
            full = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        own = [float(full[len(prompt) - 1 + i, t]) for i, t in enumerate(completion)]
        assert logprobs == pytest.approx(own, abs=1e-4)
    assert found["completion_ids"][0] != found["completion_ids"][1], "each row has its own seed"
