"""docs/api.md and docs/configuration.md: they are those that `make api` writes, and complete."""

import re
from pathlib import Path

import pytest

from support.documents import ROOT
from uniapl.config import Config
from uniapl.config.resolve import resolve

pytest.importorskip("griffe", reason="griffelib is not installed")
from support.api_page import PAGES, updated

SOURCE = '''"""A package."""

import math
from dataclasses import dataclass

from pydantic import Field


def mean(values: list[float], *, weight: float | None = None, **others: int) -> float:
    """The weighted mean; see :func:`~zoo.Animal` and <this> or `a*b`.

    Args:
        values: At
            least one * number.

    Returns:
        A number: nothing
        else.

    Raises:
        ValueError: No values.

    Example:
        mean([1.0])
    """
    return math.fsum(values)


def _private() -> None:
    """Not on the page."""


@dataclass
class Animal:
    """Eats | sleeps."""

    name: str
    """Its name, as text | bytes."""
    legs: int = Field(default=4, ge=0, lt=9)
    """Legs."""
    foods: tuple[str, ...] = ()
    """Foods."""
    friend: "Animal | None" = None
    """Another one."""
    home: Home = Home()

    @property
    def loud(self) -> bool:
        """Whether it is heard."""
        return True

    def eat(self, food: str) -> None:
        """Eat."""
'''
FUNCTION = """### `zoo.mean`

    mean(values: list[float], *, weight: float | None = None, **others: int) -> float

The weighted mean; see `Animal` and &lt;this> or `a*b`.

Arguments:

- `values`: At least one \\* number.

Returns: A number: nothing else.

Raises:

- `ValueError`: No values.

Example:

    mean([1.0])

"""
CLASS = """### `zoo.Animal`

Eats | sleeps.

| name | type | default | description |
|---|---|---|---|
| `name` | `str` |  | Its name, as text \\| bytes. |
| `legs` | `int`, at least 0, below 9 | `4` | Legs. |
| `foods` | `tuple[str, ...]` | `()` | Foods. |
| `friend` | `Animal or None` | `None` | Another one. |
| `home` | `Home` | `Home()` |  |
| `loud` | `bool`, property |  | Whether it is heard. |

#### `Animal.eat`

    eat(food: str) -> None

Eat.

"""
KEYS = """### `animal`

Eats | sleeps.

| name | type | default | description |
|---|---|---|---|
| `name` | `str` |  | Its name, as text \\| bytes. |
| `legs` | `int`, at least 0, below 9 | `4` | Legs. |
| `foods` | `list[str]` | `[]` | Foods. |
| `friend` | `Animal or null` | `null` | Another one. |
"""


def test_a_page_by_hand(tmp_path: Path) -> None:
    (tmp_path / "zoo.py").write_text(SOURCE)
    page = (
        "# Zoo\n\nText.\n\n<!-- zoo.mean -->\n\nold\n### old\n\n<!-- zoo.Animal -->\n## More\n\nKept.\n\n"
        "<!-- zoo.Animal: animal -->"
    )
    expected = (
        f"# Zoo\n\nText.\n\n<!-- zoo.mean -->\n\n{FUNCTION}<!-- zoo.Animal -->\n\n{CLASS}## More\n\nKept.\n\n"
        f"<!-- zoo.Animal: animal -->\n\n{KEYS}"
    )
    assert updated(page, tmp_path) == expected
    assert updated(expected, tmp_path) == expected
    with pytest.raises(LookupError, match=r"zoo\.lion: there is no such object"):
        updated("<!-- zoo.lion -->", tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_up_to_date(page: Path) -> None:
    assert page.read_text() == updated(page.read_text(), ROOT / "src"), "run `make api`"


def test_every_key_of_a_recipe_is_listed() -> None:
    sections = re.split(
        r"^### `([\w.]+)`$", (ROOT / "docs" / "configuration.md").read_text(), flags=re.MULTILINE
    )
    listed = {
        title: set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
        for title, text in zip(sections[1::2], sections[2::2], strict=True)
    }
    values = resolve({}).config.model_dump()
    for name, value in values.items():
        if isinstance(value, dict):
            assert value.keys() == listed[name], name
        else:
            assert name in listed["Config"]
    assert Config.model_fields.keys() == values.keys()
