"""Solvers of the demo task with tools: an expert, and a sloppy one on which the base model is trained."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uniapl.demo.arithmetic import NUMBERS, QUANTITIES, TABLE, UNKNOWN, UNREADABLE, Fact, Question, calculate
from uniapl.demo.language import NOUNS

Message = dict[str, Any]
EXPERT_FORM = "the answer is "
FORMS = (EXPERT_FORM, "it is ", "")
"""What an answer begins with."""
SIGN = re.compile(r"( [-+*] )")


def solve(question: Question) -> list[Message]:
    """The expert's trajectory: all look-ups in one turn, then one calculation, then the answer."""
    messages: list[Message] = []
    if question.facts:
        messages += _turn([("lookup", _arguments(fact)) for fact in question.facts])
        messages += [_result("lookup", TABLE[fact]) for fact in question.facts]
    messages += _turn([("calculate", {"expression": question.expression(TABLE)})])
    messages += [_result("calculate", question.answer)]
    return [*messages, _answer(EXPERT_FORM, question.answer)]


@dataclass(frozen=True, kw_only=True)
class Sloppiness:
    """Probabilities of the sloppy solver's mistakes."""

    guess: float = 0.4
    """Answers at once."""
    skip: float = 0.15
    """Invents a fact in place of looking it up."""
    wrong: float = 0.25
    """Gives a tool a wrong argument."""
    malformed: float = 0.15
    """Writes a call that cannot be read."""
    stop: float = 0.25
    """Answers without a calculation, after the look-ups."""
    slip: float = 0.1
    """Answers with another number than the result."""


def solve_sloppily(question: Question, rng: random.Random, mistakes: Sloppiness) -> list[Message]:
    """A trajectory with mistakes, in a world with another table, so that it gives no fact away."""

    def happens(probability: float) -> bool:
        return rng.random() < probability

    if happens(mistakes.guess):
        return [_answer(rng.choice(FORMS), rng.randrange(10 ** rng.choice((2, 3, 4))))]
    messages: list[Message] = []
    values: dict[Fact, int] = {fact: rng.choice(NUMBERS) for fact in question.facts}
    wanted = [fact for fact in question.facts if not happens(mistakes.skip)]
    together = happens(0.5)
    for facts in [wanted] if together and wanted else [[fact] for fact in wanted]:
        calls, results = [], []
        for fact in facts:
            asked = _wrong_fact(fact, rng) if happens(mistakes.wrong) else fact
            calls.append(("lookup", _arguments(asked)))
            results.append(_result("lookup", values[fact] if asked[0] in NOUNS else UNKNOWN))
        if happens(mistakes.malformed):
            return [*messages, _malformed(calls, rng)]
        messages += [*_turn(calls), *results]
    if happens(mistakes.stop):
        known = [*values.values(), rng.choice(NUMBERS)]
        return [*messages, _answer(rng.choice(FORMS), rng.choice(known))]
    expression = question.expression(values)
    expression = _wrong_expression(expression, rng) if happens(mistakes.wrong) else expression
    call = ("calculate", {"expression": expression})
    if happens(mistakes.malformed):
        return [*messages, _malformed([call], rng)]
    try:
        result: int | str = calculate(expression)
    except ValueError:
        result = UNREADABLE
    number = rng.randrange(10**4) if happens(mistakes.slip) or isinstance(result, str) else result
    return [*messages, *_turn([call]), _result("calculate", result), _answer(rng.choice(FORMS), number)]


def _arguments(fact: Fact) -> dict[str, str]:
    return {"name": fact[0], "quantity": fact[1]}


def _turn(calls: Sequence[tuple[str, Mapping[str, str]]]) -> list[Message]:
    functions = [{"name": name, "arguments": dict(arguments)} for name, arguments in calls]
    listed = [{"type": "function", "function": function} for function in functions]
    return [{"role": "assistant", "content": "", "tool_calls": listed}]


def _result(name: str, value: int | str) -> Message:
    content = json.dumps({"error": value}) if isinstance(value, str) else str(value)
    return {"role": "tool", "name": name, "content": content}


def _answer(form: str, number: int) -> Message:
    return {"role": "assistant", "content": f"{form}{number}"}


def written(message: Message) -> str:
    """An assistant message as the chat template writes it, without its end token."""
    calls = [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
    return message["content"] + "".join(f"<tool_call>{call}</tool_call>" for call in calls)


def _malformed(calls: Sequence[tuple[str, Mapping[str, str]]], rng: random.Random) -> Message:
    """The last turn of a trajectory: its last call lacks the beginning, the end or a quotation mark."""
    *others, last = [written(message) for call in calls for message in _turn([call])]
    part, replacement = rng.choice((('{"name": "', ""), ('"}}</tool_call>', ""), ('"}}', "}}")))
    return {"role": "assistant", "content": "".join(others) + last.replace(part, replacement)}


def _wrong_fact(fact: Fact, rng: random.Random) -> Fact:
    """Another person, another quantity, or the two exchanged."""
    name, quantity = fact
    return rng.choice(((rng.choice(NOUNS), quantity), (name, rng.choice(QUANTITIES)), (quantity, name)))


def _wrong_expression(expression: str, rng: random.Random) -> str:
    """The expression with another number or operation, or without one of them."""
    parts = SIGN.split(expression)
    place = rng.randrange(len(parts))
    other = str(rng.choice(NUMBERS)) if place % 2 == 0 else rng.choice((" + ", " - ", " * "))
    parts[place] = rng.choice((other, ""))
    return "".join(parts)
