"""The methods: each sets numbers of the configuration and is never a branch in the training loop."""

from typing import Any


def _constant_mu(value: float) -> dict[str, Any]:
    steps = {"mu_warmup_steps": 0, "mu_decay_steps": 0}
    return {"mu_controller": "schedule", "mu_peak": value, "mu_valley": value, **steps}


_COPY = {"kind": "bradley-terry"}

METHODS: dict[str, dict[str, dict[str, Any]]] = {
    # method: {"fixed": values of `objective` that define it, "proposed": defaults that the user may change}
    "sft": {
        "fixed": _constant_mu(1.0) | dict.fromkeys(("lambda_adv", "beta", "teacher_kl", "entropy_coef"), 0.0),
        "proposed": {},
    },
    "a-sft": {"fixed": _constant_mu(1.0), "proposed": {"discriminator": _COPY}},
    "grpo": {"fixed": _constant_mu(0.0) | {"lambda_adv": 0.0}, "proposed": {}},
    "a-grpo": {"fixed": _constant_mu(0.0), "proposed": {"discriminator": _COPY}},
    # arXiv 2508.11408, section 4.3: warm-up 0, decay 200, 0.9 -> 0.05; phi with a constant 0.1.
    "chord-mu": {
        "fixed": {"lambda_adv": 0.0, "sft_token_weight": "none"},
        "proposed": {
            "objective": {"mu_peak": 0.9, "mu_valley": 0.05, "mu_warmup_steps": 0, "mu_decay_steps": 200}
        },
    },
    "chord-phi": {
        "fixed": {"lambda_adv": 0.0, "sft_token_weight": "phi"},
        "proposed": {"objective": _constant_mu(0.1)},
    },
    # Our choice (docs/log.md). The first fifth of the steps trains on demonstrations only; the KL, and the
    # discriminator that multiplies the reward, keep what these steps learned.
    "uniapl": {
        "fixed": {},
        "proposed": {
            "batching": {"cold_start_steps": 0.2},
            "objective": {
                "mu_peak": 1.0,
                "mu_valley": 0.1,
                "mu_decay_steps": 0,
                "beta": 0.1,
                "lambda_adv": 1.0,
                "adversarial_placement": "multiply",
            },
        },
    },
    # arXiv 2511.10643: GRPO on the discriminator's logit only. Rewards are logged and not trained on.
    "gad": {
        "fixed": _constant_mu(0.0) | {"lambda_adv": 1.0, "lambda_controller": "fixed", "reward_weight": 0.0},
        "proposed": {"objective": {"adversarial_credit": "standardized"}, "discriminator": _COPY},
    },
    # On-policy distillation: only the KL to the teacher. Rewards are logged and not trained on.
    "opd": {
        "fixed": _constant_mu(0.0) | {"lambda_adv": 0.0, "reward_weight": 0.0},
        "proposed": {"objective": {"teacher_kl": 1.0}},
    },
}
