"""`instruction_following`: an IFEval-style file is a training set as it is.

A row says in `instruction_id_list` which instructions its prompt gives, and in `kwargs` their arguments, one
mapping for each (None where an argument has no value). An answer is judged as by IFEval (arXiv 2311.07911).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from uniapl.errors import UsageError
from uniapl.rewards.base import RowCheck
from uniapl.rewards.builtin import answer_text
from uniapl.rewards.checkers import Instruction, load_checkers, parameters
from uniapl.rewards.finding import register
from uniapl.types import Example, Prompt, prompt_text

Criterion = Literal["strict", "loose", "share"]
LISTS = {"keywords", "forbidden_words"}
"""Arguments that checkers go through; a text would be gone through letter by letter."""


@register("instruction_following")
def instruction_following(
    prompts: list[Any],
    completions: list[Any],
    instruction_id_list: list[Any],
    kwargs: list[Any],
    *,
    criterion: Criterion = "strict",
    answer_after: str | None = None,
) -> list[float | Exception]:
    """How well each answer follows its row's instructions.

    Args:
        criterion: `strict`: 1 if it follows all, else 0. `loose`: the same, but each instruction may be
            followed by one of the eight forms of :func:`loose_forms`. `share`: the share that it follows.
        answer_after: Only what stands behind this mark is judged, e.g. "</think>"; an answer without it is
            empty.
    """
    if criterion not in ("strict", "loose", "share"):
        raise UsageError(f"criterion '{criterion}': choose strict, loose or share")
    scores: list[float | Exception] = []
    for prompt, completion, ids, arguments in zip(
        prompts, completions, instruction_id_list, kwargs, strict=True
    ):
        text = answer_behind(answer_text(completion), answer_after)
        try:
            followed = check_instructions(
                instructions(prompt, ids, arguments), text, loose=criterion == "loose"
            )
        except UsageError:
            raise
        except Exception as error:  # a checker that raises has not judged
            scores.append(error)
            continue
        scores.append(sum(followed) / len(followed) if criterion == "share" else float(all(followed)))
    return scores


def check_instructions(given: Sequence[Instruction], text: str, *, loose: bool = False) -> list[bool]:
    """Which of the instructions a text follows."""
    forms = loose_forms(text) if loose else [text]
    return [any(instruction.followed_by(form) for form in forms) for instruction in given]


def loose_forms(text: str) -> list[str]:
    """The text without its first line, its last, both or none, each with and without asterisks.

    Source: IFEval (arXiv 2311.07911), section 2.2: an opening phrase, a closing one, or bold type should not
    hide that an instruction was followed.
    """
    lines = text.split("\n")
    forms = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return list(dict.fromkeys([*forms, *(form.replace("*", "") for form in forms)]))


def answer_behind(text: str, mark: str | None) -> str:
    """What stands behind the last mark; nothing where it is missing: the model never came to its answer."""
    return text if mark is None else text.rpartition(mark)[2].strip() if mark in text else ""


def instructions(prompt: Prompt, ids: Any, arguments: Any) -> list[Instruction]:
    """A row's instructions with all their arguments.

    Raises:
        UsageError: Something is missing, left over or unknown.
    """
    ids, arguments = _parsed(ids), _parsed(arguments)
    if not isinstance(ids, list | tuple) or not ids or not all(isinstance(id_, str) for id_ in ids):
        raise UsageError(f"'instruction_id_list' must be a list of names, not {ids!r:.80}")
    if not isinstance(arguments, list | tuple) or len(arguments) != len(ids):
        raise UsageError(
            f"'kwargs' must hold one mapping for each of {len(ids)} instructions: {arguments!r:.80}"
        )
    return [
        _instruction(id_, _parsed(given) or {}, prompt) for id_, given in zip(ids, arguments, strict=True)
    ]


def _instruction(id_: str, given: Any, prompt: Prompt) -> Instruction:
    if not isinstance(given, Mapping):
        raise UsageError(f"'kwargs' of '{id_}' must be a mapping, not {given!r:.80}")
    needed = parameters(id_)
    # 0 and "" are values; only None is none.
    known = {name: _plain(value) for name, value in given.items() if value is not None}
    for name in LISTS & known.keys():
        if not isinstance(known[name], list) or not all(isinstance(word, str) for word in known[name]):
            raise UsageError(
                f"instruction '{id_}': '{name}' must be a list of words, not {known[name]!r:.80}"
            )
    if "prompt" in needed and "prompt" not in known:
        known["prompt"] = prompt_text(prompt)
    for problem, names in (
        ("needs", set(needed) - known.keys()),
        ("does not take", known.keys() - set(needed)),
    ):
        if names:
            raise UsageError(
                f"instruction '{id_}' {problem} {', '.join(map(repr, sorted(names)))} "
                f"(its arguments: {', '.join(needed) or 'none'})"
            )
    return Instruction(id_, known)


def _parsed(value: Any) -> Any:
    """Some data sets keep lists and mappings as JSON, and pandas has arrays of its own."""
    try:
        return json.loads(value) if isinstance(value, str) else _plain(value)
    except ValueError:
        return value


def _plain(value: Any) -> Any:
    """Arrays as lists, and whole numbers that a table made floats of as what they were."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_rows(examples: Sequence[Example], **_: Any) -> RowCheck:
    """Which rows have an instruction that its checker would not check as the prompt says it.

    Raises:
        UsageError: A row whose instructions cannot be checked at all.
    """
    return RowCheck(
        unusable={
            row: f"whose '{instruction.id}' has an argument out of its checker's range"
            for row, given in instructions_of_rows(examples).items()
            for instruction in given
            if not instruction.is_determined()
        }
    )


def instructions_of_rows(examples: Sequence[Example]) -> dict[int, list[Instruction]]:
    """Row number -> its instructions, each of them tried once.

    Raises:
        UsageError: The checkers are not there; or naming the row and what is wrong with it.
    """
    load_checkers()
    found: dict[int, list[Instruction]] = {}
    for example in examples:
        ids, arguments = (example.columns.get(key) for key in ("instruction_id_list", "kwargs"))
        try:
            found[example.row] = instructions(example.prompt, ids, arguments)
            check_instructions(found[example.row], "An answer.")
        except UsageError as error:
            raise UsageError(f"row {example.row}: {error}") from error
        except Exception as error:  # a checker raises what it likes on arguments of a wrong kind
            raise UsageError(
                f"row {example.row}: its instructions cannot be checked: {type(error).__name__}: {error} "
                f"(instruction_id_list {ids}, kwargs {arguments})"
            ) from error
    return found


instruction_following.check_rows = check_rows  # type: ignore[attr-defined]
