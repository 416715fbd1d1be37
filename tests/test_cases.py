"""Every failing input that was collected from public reports has a test: `make test-cases` runs them."""

import ast
from collections.abc import Iterator
from pathlib import Path

NUMBERS = range(1, 26)
"""The numbers of the cases."""


def marked(path: Path) -> Iterator[int]:
    """The numbers in the `pytest.mark.case(number)` of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.case":
            yield from (ast.literal_eval(argument) for argument in node.args)


def test_every_case_has_a_test() -> None:
    found = {number for path in Path(__file__).parent.rglob("*.py") for number in marked(path)}
    assert found == set(NUMBERS)
