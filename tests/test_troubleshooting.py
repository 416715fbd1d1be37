"""docs/troubleshooting.md and docs/glossary.md: complete, and with the names that the program has."""

import re

from support.documents import ROOT
from uniapl.config.health import HealthConfig
from uniapl.config.resolve import resolve
from uniapl.training.monitor.health import evaluate_rules

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
SOURCES = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))


def test_every_health_rule_has_a_section() -> None:
    _, rules = PAGE.split("\n## Health rules\n")
    window = HealthConfig().window
    found = evaluate_rules([{}] * window, resolve({}).config, stage_step=window)
    assert sorted(re.findall(r"^### (.*)$", rules, re.MULTILINE)) == sorted(found)
    sections = re.split(r"^### ", rules, flags=re.MULTILINE)[1:]
    assert all(section.count("\n- Causes: ") == section.count("\n- Remedies: ") == 1 for section in sections)


def test_every_threshold_of_the_rules_is_named() -> None:
    assert {f"health.{name}" for name in HealthConfig.model_fields} <= set(re.findall(r"`([\w.]+)`", PAGE))


def test_keys_exist() -> None:
    values = resolve({}).config.model_dump()
    named = re.findall(r"`(\w+)\.(\w+)(?:: [^`]*)?`", PAGE)
    assert len(named) > 50
    for section, key in named:
        if key != "jsonl":
            assert key in values[section], f"{section}.{key}"


def test_messages_are_those_of_the_program() -> None:
    table = PAGE.split("\n### ")[0]
    messages = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        assert message in SOURCES, message


def test_names_of_the_glossary_exist_and_its_terms_are_sorted() -> None:
    rows = [
        line.split(" | ")
        for line in (ROOT / "docs" / "glossary.md").read_text().splitlines()
        if " | " in line
    ][1:]
    terms = [row[0].removeprefix("| ").lower() for row in rows]
    assert len(terms) > 30
    assert terms == sorted(terms)
    for row in rows:
        for name in re.findall(r"`([\w/]+)`", row[2]):
            assert name in SOURCES, name
