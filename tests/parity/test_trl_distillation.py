"""The KL to a teacher on its most likely tokens, against TRL's sparse divergence with a tail."""

import pytest
import torch
from torch.testing import assert_close

from uniapl.functional import top_k_reverse_kl

trainer = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")


@pytest.mark.parametrize("k", [1, 4])
def test_value_and_gradient_of_the_top_k_form(k: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 11, requires_grad=True)
    teacher = torch.randn(2, 5, 11).log_softmax(-1)
    top = teacher.topk(k, dim=-1)
    mask = torch.rand(2, 5) < 0.7
    own = logits.log_softmax(-1).gather(-1, top.indices)
    ours = top_k_reverse_kl(own, top.values, mask)
    (gradient,) = torch.autograd.grad(ours, logits, retain_graph=True)

    valid = torch.ones_like(top.indices, dtype=torch.bool)
    student, support = trainer._add_tail_bucket(own, valid)
    expert, _ = trainer._add_tail_bucket(top.values, valid)
    divergence = trainer._jsd_divergence(student, expert, beta=1.0, support_mask=support)
    theirs = divergence.sum(-1)[mask].sum()
    (expected,) = torch.autograd.grad(theirs, logits)
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert_close(gradient, expected, atol=1e-5, rtol=1e-5)
