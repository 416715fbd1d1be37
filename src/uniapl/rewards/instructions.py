"""`instruction_following`: a file in IFEval's format is a training set as it is.

`instruction_id_list` names the instructions in a row's prompt, and `kwargs` holds one mapping of arguments
for each (None if an argument has no value). Completions are scored as by IFEval (arXiv 2311.07911).
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

from uniapl.errors import UsageError
from uniapl.rewards.base import RowCheck
from uniapl.rewards.builtin import completion_text
from uniapl.rewards.checkers import Instruction, load_checkers, parameters
from uniapl.rewards.finding import register
from uniapl.types import Example, Prompt, prompt_text
from uniapl.untyped import is_mapping, is_sequence

Criterion = Literal["strict", "loose", "share"]
LISTS = {"keywords", "forbidden_words"}
"""Arguments that checkers iterate over; a string would be iterated letter by letter."""


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
    """How well each completion follows its row's instructions.

    Args:
        criterion: `strict`: 1 if it follows all, else 0. `loose`: the same, but any of its
            :func:`loose_forms` may follow an instruction. `share`: the fraction that it follows.
        answer_after: Only the text after this mark is scored, e.g. "</think>"; a completion without the mark
            counts as empty.
    """
    if criterion not in ("strict", "loose", "share"):
        raise UsageError(f"criterion '{criterion}': choose strict, loose or share")
    scores: list[float | Exception] = []
    for prompt, completion, ids, arguments in zip(
        prompts, completions, instruction_id_list, kwargs, strict=True
    ):
        text = text_after(completion_text(completion), answer_after)
        try:
            given = instructions(prompt, ids, arguments)
            followed = check_instructions(given, text, loose=criterion == "loose")
        except UsageError:
            raise
        except Exception as error:  # a checker that raises gives no score
            scores.append(error)
            continue
        scores.append(sum(followed) / len(followed) if criterion == "share" else float(all(followed)))
    return scores


def check_instructions(given: Sequence[Instruction], text: str, *, loose: bool = False) -> list[bool]:
    """Whether a text follows each of the instructions."""
    forms = loose_forms(text) if loose else [text]
    return [any(instruction.followed_by(form) for form in forms) for instruction in given]


def loose_forms(text: str) -> list[str]:
    """The text without its first line, its last line, both or neither, each with and without asterisks.

    Source: IFEval (arXiv 2311.07911), section 2.2: an opening or closing phrase or bold type should not hide
    that an instruction was followed.
    """
    lines = text.split("\n")
    forms = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return list(dict.fromkeys([*forms, *(form.replace("*", "") for form in forms)]))


def text_after(text: str, mark: str | None) -> str:
    """The text after the last mark, "" if the mark is missing; all of it if `mark` is None."""
    return text if mark is None else text.rpartition(mark)[2].strip() if mark in text else ""


def instructions(prompt: Prompt, ids: Any, arguments: Any) -> list[Instruction]:
    """A row's instructions with all their arguments.

    Raises:
        UsageError: An instruction is unknown, or arguments are missing, superfluous or of a wrong type.
    """
    ids, arguments = _parsed(ids), _parsed(arguments)
    if not is_sequence(ids) or not ids or not all(isinstance(id_, str) for id_ in ids):
        raise UsageError(f"'instruction_id_list' must be a list of names, not {ids!r:.80}")
    if not is_sequence(arguments) or len(arguments) != len(ids):
        raise UsageError(
            f"'kwargs' must hold one mapping for each of {len(ids)} instructions: {arguments!r:.80}"
        )
    return [
        _instruction(prompt, id_, _parsed(given) or {}) for id_, given in zip(ids, arguments, strict=True)
    ]


def _instruction(prompt: Prompt, id_: str, given: Any) -> Instruction:
    if not is_mapping(given):
        raise UsageError(f"'kwargs' of '{id_}' must be a mapping, not {given!r:.80}")
    needed = parameters(id_)
    # 0 and "" are values; only None means that there is none.
    known = {name: _plain(value) for name, value in given.items() if value is not None}
    for name in LISTS & known.keys():
        if not isinstance(known[name], list) or not all(isinstance(word, str) for word in known[name]):
            raise UsageError(
                f"instruction '{id_}': '{name}' must be a list of words, not {known[name]!r:.80}"
            )
    if "prompt" in needed:
        known.setdefault("prompt", prompt_text(prompt))
    missing, extra = set(needed) - known.keys(), known.keys() - set(needed)
    if missing or extra:
        problem = "needs" if missing else "does not take"
        raise UsageError(
            f"instruction '{id_}' {problem} {', '.join(map(repr, sorted(missing or extra)))} "
            f"(its arguments: {', '.join(needed) or 'none'})"
        )
    return Instruction(id_, known)


def _parsed(value: Any) -> Any:
    """The value, parsed if it is JSON, as some data sets store it; a list if it is an array, as in pandas."""
    try:
        return json.loads(value) if isinstance(value, str) else _plain(value)
    except ValueError:
        return value


def _plain(value: Any) -> Any:
    """Arrays as lists, and integers that a table stored as floats as integers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_rows(examples: Sequence[Example], **_: Any) -> RowCheck:
    """Find rows with an instruction that its checker would not check as the prompt states it.

    Raises:
        UsageError: The instructions of a row cannot be checked at all.
    """
    return RowCheck(
        unusable={
            row: f"whose '{instruction.id}' has an argument outside its checker's range"
            for row, given in instructions_of_rows(examples).items()
            for instruction in given
            if not instruction.is_determined()
        }
    )


def instructions_of_rows(examples: Sequence[Example]) -> dict[int, list[Instruction]]:
    """Row number -> its instructions, each tried on one text.

    Raises:
        UsageError: The checkers are not installed, or a row's instructions cannot be checked.
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
        except Exception as error:  # checkers raise various errors on arguments of a wrong type
            raise UsageError(
                f"row {example.row}: its instructions cannot be checked: {type(error).__name__}: {error} "
                f"(instruction_id_list {ids}, kwargs {arguments})"
            ) from error
    return found


instruction_following.check_rows = check_rows  # type: ignore[attr-defined]
