"""Errors for unknown keys and flags, with the key that was probably meant."""

import difflib

# Old keys of this library, and names of other libraries in any section. Names that resemble today's key, such
# as lora_rank and lora_r, need no entry.
OTHER_NAMES = {
    "batch_size": "batching.prompts_per_step",
    "batching.max_tokens": "batching.max_tokens_per_micro_batch",
    "clip_range": "objective.epsilon",
    "data.string_prompts": "data.prompt_format",
    "dataset_config": "data.name",
    "dataset_name": "data.path",
    "dataset_train_split": "data.split",
    "discriminator.against": "discriminator.density_ratio_reference",
    "discriminator.lora_rank": "discriminator.lora_r",
    "discriminator.reads_example": "discriminator.in_context_demonstration",
    "discriminator.replay_share": "discriminator.replay_fraction",
    "group_size": "rollout.num_generations",
    "health.max_accuracy": "health.max_discriminator_accuracy",
    "kl_coef": "objective.beta",
    "lr": "optim.learning_rate",
    "max_new_tokens": "rollout.max_completion_length",
    "max_tokens": "rollout.max_completion_length",
    "model": "model.model_name_or_path",
    "mu": "objective.mu_peak",
    "n_samples_per_prompt": "rollout.num_generations",
    "objective.adversarial_assignment": "objective.adversarial_credit",
    "objective.gate_reward": "objective.gate_threshold",
    "repeat_times": "rollout.num_generations",
    "resume_from_checkpoint": "resume",
    "rollout.max_rows": "rollout.max_batch_size",
    "rollout.one_step_off": "rollout.max_off_policy_steps (1 for true, 0 for false)",
    "stop": "early_stopping",
    "stop.max_tokens": "early_stopping.max_tokens",
    "train_batch_size": "batching.prompts_per_step",
    "train_dataset": "data.path",
    "use_vllm": "rollout.sampler",
}
from uniapl.config import Config
from uniapl.config.other_libraries import NO_EQUIVALENT, OTHER_NAMES
from uniapl.config.section import flatten


def unknown(name: str, kind: str = "key") -> str:
    """The error for an unknown key, or for an unknown flag (kind "flag", with its dashes)."""
    key = name.removeprefix("--").replace("-", "_")
    return f"unknown {kind} '{name:.80}'{suggestion(key, as_flag=kind == 'flag')}"


def suggestion(key: str, *, as_flag: bool = False) -> str:
    """The end of the error: the key that was probably meant, why there is none, or how to list all keys."""
    known = flatten(Config())
    leaf = key.rsplit(".", 1)[-1]
    # Of keys with the same leaf the first is meant, and of the two optimizers the policy's.
    ordered = sorted(known, key=lambda name: name.startswith("discriminator."))
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(ordered)}
    best = OTHER_NAMES.get(key) or OTHER_NAMES.get(leaf) or by_leaf.get(leaf)
    if best is None and (reason := NO_EQUIVALENT.get(key) or NO_EQUIVALENT.get(leaf)):
        return f"; it has no equivalent: {reason}"
    if best is None:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        near = near or [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.75)]
        best = near[0] if near else None
    if best is None:
        return "; `uniapl train --help-all` lists all keys"
    if not as_flag:
        return f"; did you mean '{best}'?"
    name, *explanation = best.split(" ", 1)
    if name in Config.model_fields and name not in known:  # a section
        return f"; did you mean the flags '--{name.replace('_', '-')}.*'?"
    shown = " ".join([f"--{name.replace('_', '-')}", *explanation])
    return f"; did you mean '{shown}'?"
