"""Checks of a stage's data, rewards and discriminator before training."""

from collections.abc import Collection, Sequence

from transformers import AutoModel, PreTrainedTokenizerBase

from uniapl.config import Config, DiscriminatorConfig, ModelConfig
from uniapl.config.objective import ObjectiveConfig
from uniapl.data.rows import Dataset
from uniapl.data.streams import is_held_out
from uniapl.discriminator.demonstrations import Demonstrations
from uniapl.discriminator.polar import Polar, PolarFormat
from uniapl.errors import UsageError
from uniapl.http import check_url
from uniapl.models.loading import ModelSource, check_policy, has_local_weights, load_weights, refuse_adapter
from uniapl.models.lora import require_peft
from uniapl.rewards import Rewarder
from uniapl.rollout.engines import check_vllm
from uniapl.training.inputs import prompts_drawn, stream_examples
from uniapl.training.monitor.trackers import check_trackers
from uniapl.training.optimizer import check_schedule
from uniapl.training.state_adversary import STATE_KINDS
from uniapl.types import Example

MAX_UNKNOWN_FRACTION = 0.5
"""Fraction of unknown tokens above which the tokenizer does not fit the data. Our choice."""


def check_recipe(config: Config, stages: Sequence[Config] = (), *, has_rows: bool = False) -> None:
    """Check what needs no data.

    Args:
        has_rows: Whether `uniapl.train` was given rows to evaluate.

    Raises:
        UsageError: Evaluation has no suite, a tracker or peft is not installed, or a stage has other tools.
    """
    check_tools(config, stages)
    check_trackers(config.report_to)
    if config.eval_steps and not config.evaluation.suites and not has_rows:
        raise UsageError("eval_steps: evaluation.suites is empty; add files or benchmarks, or unset it")
    if config.model.lora_r is not None:
        require_peft()


def check_tools(config: Config, stages: Sequence[Config]) -> None:
    """Check that all stages have the tools and the environment of the run, because they share its prompts.

    Raises:
        UsageError: A stage has others.
    """
    for number, stage in enumerate(stages, start=1):
        for key in ("tools", "environment"):
            if getattr(stage.rollout, key) != getattr(config.rollout, key):
                raise UsageError(
                    f"stage {number} cannot change rollout.{key}: all stages share the prompts, "
                    "which contain the schemas of tools; set it outside of the stages"
                )


def check_evaluation(config: Config, *, has_function: bool) -> None:
    """Check that what depends on evaluation has one.

    Args:
        config: The last stage's.
        has_function: Whether `uniapl.train` was given a function that evaluates.

    Raises:
        UsageError: A key has no effect.
    """
    metric = config.early_stopping.metric
    if config.eval_steps or has_function:
        return
    remedy = "set eval_steps and evaluation.suites"
    if config.eval_on_start:
        raise UsageError(f"eval_on_start: there is nothing to evaluate; {remedy}")
    if config.load_best_model_at_end and metric.startswith("eval/"):
        raise UsageError(f"load_best_model_at_end: nothing measures '{metric}'; {remedy}")


def check_tokens(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, stop_ids: Collection[int]
) -> list[str]:
    """Notes on rows with text that the tokenizer does not know.

    Raises:
        UsageError: Most tokens of the data are unknown or padding.
    """
    # GPT-2 uses one token for all of these, which is a part of normal text.
    eos, bos, unk, pad = (getattr(tokenizer, f"{name}_token_id") for name in ("eos", "bos", "unk", "pad"))
    unknown = {unk, pad} - {*stop_ids, eos, bos, None}
    total, lost, rows = 0, 0, []
    for example in dataset.examples:
        ids = (*example.prompt_ids, *(example.demonstration_ids or ()))
        found = sum(token in unknown for token in ids)
        total, lost = total + len(ids), lost + found
        rows += [example.row] * (found > 0)
    if not rows:
        return []
    names = " or ".join(f"'{name}'" for name in sorted(map(str, tokenizer.convert_ids_to_tokens([*unknown]))))
    if lost > MAX_UNKNOWN_FRACTION * total:
        raise UsageError(
            f"row {rows[0]} and others: the tokenizer does not fit the data, {lost / total:.0%} of whose "
            f"tokens are {names}. Use the tokenizer that belongs to the model, or a model for this text"
        )
    return [
        f"{len(rows)} rows contain text that the tokenizer does not know ({lost} tokens are {names}): rows "
        f"{_first(rows)}"
    ]


def notes_on_lengths(stages: Sequence[Config], dataset: Dataset) -> list[str]:
    """Notes on demonstrations that are longer than a rollout can be."""
    limits = {
        stage.rollout.max_completion_length
        for stage in stages
        if stage.objective.uses_rollouts
        and (stage.learns_from_demonstrations or stage.objective.lambda_adv > 0)
    }
    lengths = {e.row: len(e.demonstration_ids) for e in dataset.examples if e.demonstration_ids is not None}
    notes: list[str] = []
    for limit in sorted(limits):
        if rows := [row for row, length in lengths.items() if length > limit]:
            notes.append(
                f"{len(rows)} of {len(lengths)} demonstrations are longer than "
                f"rollout.max_completion_length {limit}, the longest has {max(lengths.values())} tokens, so "
                "that rollouts cannot reach them: raise it, or leave them out with "
                f"data.max_demonstration_length (rows {_first(rows)})"
            )
    return notes


def notes_on_adversary(stages: Sequence[Config], dataset: Dataset, rewarder: Rewarder) -> list[str]:
    """Notes on keys that the discriminator does not use, and on prompts without a reward to change."""
    notes: list[str] = []
    for stage in stages:
        placement, kind = stage.objective.adversarial_placement, stage.discriminator.kind
        if not stage.objective.lambda_adv:
            continue
        notes += [
            f"discriminator.{key} has no effect with kind {kind}: it belongs to {' and '.join(kinds)}"
            for key, kinds in stage.discriminator.unused_keys.items()
        ]
        if placement == "loss":
            continue
        prompts, _ = stream_examples(stage, dataset, rewarder)
        rewarded = [example for example in prompts if rewarder.applies_to(example)]
        rows = [example.row for example in prompts if not rewarder.applies_to(example)]
        if kind in ("polar", "remote") and all(example.demonstration_ids is None for example in rewarded):
            notes.append(
                f"the adversary is never used: discriminator.kind {kind} compares a completion with the "
                f"demonstration of its prompt, objective.adversarial_placement {placement} changes its "
                "reward, and no row has both. Add a 'completion' to rows with a reward"
            )
        elif rows:
            notes.append(
                f"{len(rows)} of {len(prompts)} sampled prompts have no reward that "
                f"objective.adversarial_placement {placement} could change, so that the adversary does not "
                "act on their completions: add a reward function that applies to them, or set "
                f"objective.adversarial_placement to loss (rows {_first(rows)})"
            )
    return [*dict.fromkeys(notes)]


def notes_on_selection(stages: Sequence[Config], dataset: Dataset, rewarder: Rewarder) -> list[str]:
    """Notes on settings that choose prompts by their rewards, in stages without rewards or too few steps."""
    notes: list[str] = []
    drawn = prompts = 0
    for stage in stages:
        if not stage.objective.uses_rollouts:
            continue
        if stage.rollout.max_resample_times and not stage.objective.learns_from_rewards:
            notes.append(
                f"rollout.max_resample_times has no effect: method '{stage.method}' does not train on rewards"
            )
        if stage.batching.prompt_selection == "informative" and not rewarder.rewards:
            notes.append(
                "batching.prompt_selection informative has no effect: without rewards.functions no rollout "
                "passes or fails"
            )
        elif stage.batching.prompt_selection == "informative":
            # Stages without this selection keep no pass rates.
            drawn += prompts_drawn(stage) * (1 + stage.rollout.max_resample_times)
            prompts = len(stream_examples(stage, dataset, rewarder)[0])
    if 0 < drawn <= prompts:
        notes.append(
            f"batching.prompt_selection informative skips no prompt: the steps draw {drawn} prompts, at most "
            f"one pass over the {prompts} of the data, and only a prompt that was sampled before is skipped. "
            "Raise max_steps, or use uniform"
        )
    return [*dict.fromkeys(notes)]


def notes_on_pairs(stages: Sequence[Config], dataset: Dataset) -> list[str]:
    """Notes on rows that form no preference pair, or on settings of pairs if no stage uses pairs."""
    if any(stage.objective.pref_weight for stage in stages):
        of_data = [stage for stage in stages if stage.objective.pairs_rejected]
        return [*dict.fromkeys(note for stage in of_data for note in _rows_without_pair(stage, dataset))]
    default = ObjectiveConfig()
    keys = [
        key
        for stage in stages
        for key in ("pref_pairs", "beta_pref")
        if getattr(stage.objective, key) != getattr(default, key)
    ]
    return [f"objective.{key} has no effect: objective.pref_weight is 0" for key in dict.fromkeys(keys)]


def _rows_without_pair(stage: Config, dataset: Dataset) -> list[str]:
    demonstrated = [example for example in dataset.examples if example.demonstration_ids is not None]
    single = [example.row for example in demonstrated if example.rejected_ids is None]
    equal = [e.row for e in demonstrated if e.rejected_ids is not None and not e.is_pair]
    kinds = (("have no 'rejected'", single), ("have equal 'chosen' and 'rejected'", equal))
    use = "are only demonstrations" if stage.imitates else f"are not used by method '{stage.method}'"
    return [
        f"{len(rows)} of {len(demonstrated)} demonstrations {what}, form no preference pair and {use} (rows "
        f"{_first(rows)})"
        for what, rows in kinds
        if rows
    ]


def _first(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")


def check_stage(config: Config, dataset: Dataset, rewarder: Rewarder, notes: Sequence[str] = ()) -> None:
    """Check that data, rewards and discriminator provide what the method needs.

    Args:
        notes: Notes of the reward functions about the rows; they may explain why no function applies.

    Raises:
        UsageError: The first requirement that is not met.
    """
    for steps in {config.cold_start_steps, config.max_steps - config.cold_start_steps} - {0}:
        check_schedule(config.optim, steps)
    objective, method = config.objective, f"method '{config.method}'"
    prompts, demonstrations = stream_examples(config, dataset, rewarder)
    rewarded, adversarial = objective.learns_from_rewards, objective.lambda_adv > 0
    if rewarded and not rewarder.rewards:
        raise UsageError(
            f"{method} needs rewards: set rewards.functions, or choose sft, a-sft, gad, opd or dpo"
        )
    _check_pairs(config, prompts, demonstrations)
    if config.learns_from_demonstrations and not demonstrations:
        raise UsageError(
            f"{method} needs demonstrations, but no row has a 'completion' (or 'messages' that end with the "
            "assistant): add them, or choose grpo"
        )
    if adversarial and all(example.demonstration_ids is None for example in demonstrations):
        raise UsageError(
            f"{method} compares completions with demonstrations, but no row has a 'completion': add them, or "
            "set objective.lambda_adv to 0"
        )
    if adversarial and not rewarded and objective.adversarial_placement != "loss":
        raise UsageError(f"{method} uses no rewards: set objective.adversarial_placement to loss")
    names = [reward.name for reward in rewarder.rewards]
    if objective.pass_reward is not None and objective.pass_reward not in names:
        raise UsageError(
            f"objective.pass_reward: no reward function is called '{objective.pass_reward}'; choose one of "
            f"{', '.join(names) or 'none'}"
        )
    if objective.mu_controller != "schedule" and not rewarder.rewards:
        name = objective.mu_controller
        raise UsageError(f"objective.mu_controller '{name}' needs rewards: set rewards.functions")
    if objective.mu_controller == "gate" and not any(example.demonstration_ids for example in prompts):
        raise UsageError(
            "objective.mu_controller 'gate' trains on the demonstrations of sampled prompts, but no sampled "
            "prompt has one: add a 'completion' to rows that a reward applies to"
        )
    if adversarial:
        _check_discriminator(config, prompts)
    if rewarded and not any(map(rewarder.applies_to, dataset.examples)):
        reason = f"{method} needs rewards, but no reward function applies to any row"
        raise UsageError("; ".join([reason, *notes]))
    if objective.uses_rollouts and not prompts:
        raise UsageError(f"{method} samples completions, but no row has a reward or a demonstration")
    if objective.uses_rollouts and config.rollout.sampler == "vllm":
        check_vllm(config.rollout)


def _check_pairs(config: Config, prompts: Sequence[Example], demonstrations: Sequence[Example]) -> None:
    if config.objective.pairs_rollouts and all(example.demonstration_ids is None for example in prompts):
        raise UsageError(
            "objective.pref_weight compares completions with the demonstration of their prompt, but no "
            "sampled prompt has one: add a 'completion' to rows, or, if the rows have 'chosen' and "
            "'rejected', set objective.pref_pairs to rejected"
        )
    if config.objective.pairs_rejected and not any(example.is_pair for example in demonstrations):
        other = (
            "or use another method with objective.pref_weight"
            if config.method == "dpo"
            else "or set objective.pref_pairs to rollouts"
        )
        raise UsageError(
            "objective.pref_pairs 'rejected' needs preference pairs, but no row has 'chosen' and a different "
            f"'rejected': add them (data.columns renames columns), {other}"
        )


def _check_discriminator(config: Config, prompts: Sequence[Example]) -> None:
    settings = config.discriminator
    kind, model, pairwise = settings.kind, settings.model_name_or_path, settings.kind == "bradley-terry"
    if model is not None and kind in STATE_KINDS:
        raise UsageError(
            f"discriminator.kind '{kind}' reads the KL reference: remove discriminator.model_name_or_path"
        )
    if settings.layers and kind != "head":
        raise UsageError("discriminator.layers needs discriminator.kind head")
    if settings.lora_r is not None and (model or not pairwise):
        raise UsageError(
            "discriminator.lora_r trains adapters on the policy: set discriminator.kind to bradley-terry and "
            "remove discriminator.model_name_or_path"
        )
    if settings.num_layers is not None and (model or settings.lora_r or not pairwise):
        raise UsageError(
            "discriminator.num_layers shortens a copy of the policy: set discriminator.kind to bradley-terry "
            "and remove discriminator.model_name_or_path and discriminator.lora_r"
        )
    if settings.lora_r is not None and settings.freeze_after_steps is not None and not config.model.lora_r:
        raise UsageError(
            "discriminator.freeze_after_steps cannot freeze adapters (discriminator.lora_r) while all "
            "weights of the policy are trained: remove one of the two, or set model.lora_r"
        )
    paired = [example for example in prompts if example.demonstration_ids]
    held_out = [example for example in paired if is_held_out(example, config)]
    if settings.held_out_fraction and not 0 < len(held_out) < len(paired):
        raise UsageError(
            f"discriminator.held_out_fraction {settings.held_out_fraction} holds out {len(held_out)} of "
            f"{len(paired)} prompts with a demonstration: choose a value that leaves prompts on both sides"
        )
    _check_discriminator_loss(settings, [e for e in paired if not is_held_out(e, config)])
    different = {example.prompt_ids for example in paired} - {example.prompt_ids for example in held_out}
    if settings.in_context_demonstration and not pairwise:
        raise UsageError("discriminator.in_context_demonstration needs discriminator.kind bradley-terry")
    if settings.in_context_demonstration and len(different) < 2:
        raise UsageError(
            "discriminator.in_context_demonstration needs demonstrations of at least two different prompts"
        )
    if model is None and kind in ("polar", "remote", "density-ratio"):
        raise UsageError(f"discriminator.kind '{kind}' needs discriminator.model_name_or_path")
    if kind == "remote" and settings.url is None:
        raise UsageError("discriminator.kind 'remote' needs discriminator.url")
    if kind == "remote":
        check_url("discriminator.url", str(settings.url))
    if model is not None:
        _check_discriminator_model(model, kind, settings.trust_remote_code)


def _check_discriminator_loss(settings: DiscriminatorConfig, demonstrated: Sequence[Example]) -> None:
    """Check the settings that only some losses and kinds have.

    Args:
        demonstrated: Prompts with a demonstration that the discriminator is trained on.
    """
    kind, trained = settings.kind, settings.kind in ("head", "bradley-terry")
    if settings.loss is not None and not trained:
        raise UsageError(f"discriminator.loss: kind '{kind}' is not trained; use kind bradley-terry")
    if settings.loss == "paired" and kind == "head":
        raise UsageError(
            "discriminator.loss: kind 'head' has only the unpaired loss; remove the key, or set "
            "discriminator.kind to bradley-terry"
        )
    if settings.mismatched_demonstrations and not trained:
        raise UsageError(
            f"discriminator.mismatched_demonstrations: kind '{kind}' is not trained; use kind head or "
            "bradley-terry"
        )
    known = Demonstrations(demonstrated)
    if settings.mismatched_demonstrations and not any(known.mismatched(e, 1) for e in known.examples):
        raise UsageError(
            "discriminator.mismatched_demonstrations needs different demonstrations of at least two prompts: "
            "add rows, or set it to 0"
        )
    if settings.label_smoothing and not settings.is_paired:
        raise UsageError(
            "discriminator.label_smoothing applies to pairs of completions: remove it, or use "
            "discriminator.kind bradley-terry with discriminator.loss paired"
        )
    if not settings.log_probability_features and kind != "head":
        raise UsageError("discriminator.log_probability_features needs discriminator.kind head")


def _check_discriminator_model(name: str, kind: str, trusted: bool) -> None:
    """Check the files of a discriminator without reading its weights."""
    if kind == "bradley-terry":
        refuse_adapter("discriminator", name)
        if has_local_weights(name):
            load_weights(AutoModel, "discriminator", name, headers_only=True, trust_remote_code=trusted)
    elif kind == "density-ratio":
        model = ModelConfig(model_name_or_path=name, trust_remote_code=trusted)
        check_policy(ModelSource.resolve(model), model)
    else:
        PolarFormat.load(name, trust_remote_code=trusted)
        if kind == "polar" and has_local_weights(name):
            Polar.load_classifier(name, trust_remote_code=trusted, headers_only=True)
