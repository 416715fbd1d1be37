"""TRL's DPOTrainer as an oracle: the same pairs and weights, the same loss, metrics and gradients as ours."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from torch.testing import assert_close
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from support.tiny import make_model, make_tokenizer
from uniapl.config import DataConfig
from uniapl.data.batching import micro_batches
from uniapl.data.rows import tokenize_row
from uniapl.models.policy import Policy
from uniapl.models.token_states import TokenReader
from uniapl.training.monitor.metrics import update_metrics
from uniapl.training.update.batch import MixedBatch
from uniapl.training.update.pairs import pair_rejected, with_reference
from uniapl.training.update.policy_step import LossSettings, policy_step

PAIRS = [
    {"prompt": "say a.", "chosen": "aaa", "rejected": "b"},
    {"prompt": "say something long.", "chosen": "x", "rejected": "no, never"},
    {"prompt": "b", "chosen": "bbbbbbbb", "rejected": "bb"},
]
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def undisturbed_process() -> Iterator[None]:
    """Take back what TRL's trainers do to the process: environment, seeds, accelerate's singletons."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"CI": "1"}))
        for singleton in (AcceleratorState, GradientState, PartialState):
            stack.enter_context(mock.patch.dict(singleton._shared_state, clear=True))
        stack.enter_context(torch.random.fork_rng())
        yield


class KeepGradients(torch.optim.SGD):
    """An optimizer that keeps the gradients of its step and changes nothing."""

    def step(self, closure: Any = None) -> None:
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_loss_metrics_and_gradients_are_trls(beta: float, packed: bool, tmp_path: Path) -> None:
    # The policy is not its reference, so that margins are not zero; TRL's reference is the model it is given.
    tokenizer, theirs, reference = make_tokenizer(), make_model("llama", seed=1), make_model("llama", seed=2)
    with torch.no_grad():
        for one, other in zip(reference.parameters(), theirs.parameters(), strict=True):
            one.copy_(other + 0.2 * one)
    ours = deepcopy(theirs)
    trainer = DPOTrainer(
        model=theirs,
        ref_model=deepcopy(reference),
        args=DPOConfig(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            bf16=False,  # TRL's default is autocast
            gradient_checkpointing=False,
            beta=beta,
            seed=0,
        ),
        train_dataset=Dataset.from_list([dict(row) for row in PAIRS]),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    samples: list[Any] = list(trainer.train_dataset)
    model: Any = trainer.model
    loss = trainer.training_step(model, trainer.data_collator(samples), None)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}

    examples = [tokenize_row(n, row, tokenizer, DataConfig()) for n, row in enumerate(PAIRS)]
    reader = TokenReader(
        model=Policy(reference),
        layers=(),
        temperature=1.0,
        pad_id=0,
        max_tokens=30,
        packed=packed,
        device=torch.device("cpu"),
    )
    rows = with_reference(pair_rejected(examples, temperature=1.0), reader.read)
    for row, sample in zip(rows, samples, strict=True):
        assert row.chosen is not None
        assert list(row.chosen.completion_ids) == sample["chosen_ids"]
        assert list(row.completion_ids) == sample["rejected_ids"]
    policy = Policy(ours)
    optimizer = KeepGradients(policy.parameters(), lr=1.0)
    weights = {"sft": 0.0, "rl": 0.0, "adv": 0.0, "kl": 0.0, "pref": 1.0}
    batches = micro_batches(rows, pad_id=0, max_tokens=40, packed=packed)
    assert len(batches) > 1
    batch = MixedBatch(rows=rows, micro_batches=batches, weights=weights)
    settings = LossSettings(clip_low=0.2, clip_high=0.2, beta_pref=beta)
    step = policy_step(Accelerator(cpu=True), policy, optimizer, batch, settings)
    assert step.sums["loss"] == pytest.approx(float(loss), abs=TOLERANCE)
    for (name, _), mine in zip(ours.named_parameters(), optimizer.gradients, strict=True):
        grad = expected[name]
        assert grad is not None
        largest = float(grad.abs().max())
        assert largest > 1e-4, name
        assert_close(mine, grad, atol=TOLERANCE * min(1.0, largest), rtol=0, msg=f"{name}: differs")
    logged = update_metrics(step, batch.counts, weights)
    assert logged["loss/pref"] == pytest.approx(float(loss), abs=TOLERANCE)
    found = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert logged[name] == pytest.approx(found[name], abs=1e-4), name
    assert abs(logged["rewards/margins"]) > 0.05
