"""The methods: each is a setting of the objective's numbers, never a branch in the loop."""

from typing import Any


def _constant_mu(value: float) -> dict[str, Any]:
    steps = {"mu_warmup_steps": 0, "mu_decay_steps": 0}
    return {"mu_controller": "schedule", "mu_peak": value, "mu_valley": value, **steps}


METHODS: dict[str, dict[str, dict[str, Any]]] = {
    # method: {"fixed": what makes it this method, "proposed": values where the user gives none}
    "sft": {"fixed": _constant_mu(1.0) | {"lambda_adv": 0.0, "beta": 0.0}, "proposed": {}},
    "a-sft": {"fixed": _constant_mu(1.0), "proposed": {}},
    "grpo": {"fixed": _constant_mu(0.0) | {"lambda_adv": 0.0}, "proposed": {}},
    "a-grpo": {"fixed": _constant_mu(0.0), "proposed": {}},
    # arXiv 2508.11408, section 4.3: warm-up 0, decay 200, 0.9 -> 0.05; phi with a constant 0.1.
    "chord-mu": {
        "fixed": {"lambda_adv": 0.0, "sft_token_weight": "none"},
        "proposed": {"mu_peak": 0.9, "mu_valley": 0.05, "mu_warmup_steps": 0, "mu_decay_steps": 200},
    },
    "chord-phi": {
        "fixed": {"lambda_adv": 0.0, "sft_token_weight": "phi"},
        "proposed": _constant_mu(0.1),
    },
    # Our choice (docs/log.md): the KL holds what the first steps have learnt from the demonstrations.
    "uniapl": {"fixed": {}, "proposed": {"beta": 0.1, "reference_step": 25}},
    # arXiv 2511.10643: GRPO on the discriminator's logit alone. Rewards are watched, not learnt from.
    "gad": {
        "fixed": _constant_mu(0.0) | {"lambda_adv": 1.0, "lambda_controller": "fixed", "reward_weight": 0.0},
        "proposed": {"adversarial_credit": "standardized"},
    },
}
