"""The model card: its metadata, what it reports, and code that loads the model."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from support.runs import evaluated, lines, recipe, train
from support.tiny import make_tokenizer
from uniapl.config import Config
from uniapl.models.loading import ModelSource
from uniapl.report.adversary import AdversaryEffect
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.checkpoint.model_card import model_card

QWEN = ModelSource(base="Qwen/Qwen3-0.6B")


def config(**values: Any) -> Config:
    return Config.model_validate({"model": {"model_name_or_path": QWEN.base}, **values})


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_of_hub_models_and_data() -> None:
    """The whole text; the numbers are those given."""
    settings = config(
        data={"path": "openai/gsm8k", "name": "main"},
        rewards={"functions": ["accuracy_reward", "/home/ann/secret/mine.py:short"]},
        evaluation={"suites": ["held_out.jsonl"], "num_samples": 2, "temperature": 0.5},
        optim={"learning_rate": 2e-6},
        seed=3,
    )
    last = {
        "step": 40,
        "reward": 0.123456,
        "kl": None,
        "sft/nll": 1.5,
        "loss": 9.0,
        "eval/held_out/reward": 0.75,
        "eval/held_out/unscored": 0.0,
        "eval/held_out/tools/call_frequency": 1.0,
        "eval/mine": 2,
        "eval/text": "not a number",
    }
    effect = AdversaryEffect(
        steps=5, rollout_steps=4, active_steps=2, changed_steps=2, reward_change=0.5, advantage_change=0.25
    )
    card = model_card(settings, QWEN, ["sft", "uniapl"], 40, last, effect, {"held_out": 1200})
    assert front(card) == {
        "base_model": "Qwen/Qwen3-0.6B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["uniapl", "sft"],
        "datasets": ["openai/gsm8k"],
    }
    assert (
        card.split("---\n", 2)[2]
        == f"""\
# Qwen/Qwen3-0.6B, trained by UniAPL

Trained by [UniAPL](https://arxiv.org/abs/2509.25148) {version("uniapl")}: sft -> uniapl, 40 steps, seed 3.

- demonstrations and prompts: openai/gsm8k
- rewards: accuracy_reward, mine.py:short
- learning rate 2e-06, 8 rollouts per prompt, up to 256 tokens each
- {effect.sentence}

## Results after step 40

| metric | value | measured |
|---|---|---|
| eval/held_out/reward | 0.75 | 1,200 prompts of 'held_out'; completions per prompt: 2; temperature 0.5 |
| eval/mine | 2 | evaluation after the step |
| reward | 0.1235 | mean over the step's rollouts of training prompts |
| sft/nll | 1.5 | negative log-likelihood of the step's demonstrations, in nats per token |

## Load the model

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""
    )


def test_a_card_of_local_files_names_no_directory(model_dir: Path, tmp_path: Path) -> None:
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "*.csv")]
    settings = config(model={"model_name_or_path": str(model_dir)}, data={"path": files})
    card = model_card(settings, ModelSource(base=str(model_dir)), ["grpo"], 1, {}, AdversaryEffect())
    assert front(card).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "demonstrations and prompts: a.jsonl, *.csv\n" in card
    assert "Results" not in card
    assert str(tmp_path) not in card
    assert str(model_dir.parent) not in card


@pytest.mark.parametrize("rank", [None, 2])
def test_the_code_of_a_card_loads_the_model(rank: int | None, model_dir: Path, tmp_path: Path) -> None:
    """A complete model and an adapter: the loaded one gives the logits of the result."""
    result = train(recipe(model_dir, tmp_path / "run", model={"lora_r": rank}, **evaluated(tmp_path)))
    card = (result.final_dir / "README.md").read_text()
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    for key in ("reward", "sft/nll", "eval/held_out/mean_length"):
        assert f"| {key} | {last[key]:.4g} | " in card
    assert "| 5 prompts of 'held_out'; completions per prompt: 1; temperature 0 |" in card
    assert "\n- the adversary acted in 3 of 4 steps with rollouts\n\n## Results after step 4\n" in card
    assert front(card)["library_name"] == ("peft" if rank else "transformers")
    assert front(card)["tags"] == ["uniapl", *(["lora"] if rank else [])]
    code = card.split("```python\n")[1].split("```")[0].replace('"PATH"', repr(str(result.final_dir)))
    loaded: dict[str, Any] = {}
    exec(code, loaded)
    ids = torch.tensor([make_tokenizer()("say a.").input_ids])
    assert loaded["tokenizer"]("say a.").input_ids == ids[0].tolist()
    torch.testing.assert_close(loaded["model"](ids).logits, result.model(ids).logits, atol=1e-5, rtol=1e-5)
    saved = checkpoint.checkpoint_path(tmp_path / "run", 4) / "README.md"
    assert saved.read_text() == card, "a checkpoint has its own card"
