"""Limits of the design: import directions, sizes, lazy imports, and documents that match the code."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from uniapl.config.resolve import resolve

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "uniapl"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lower layers never import higher ones. errors has no dependencies and may be used anywhere.
LAYERS = [
    {"functional", "tolerance", "starters"},
    {"types", "untyped", "files", "http", "threads", "intervals"},
    {"config"},
    {"data", "models"},
    {"rollout", "rewards", "discriminator", "teacher"},
    {"tools"},
    {"evaluation"},
    {"compose", "collect", "report"},
    {"training"},
    {"demo"},
    {"compare"},
    {"cli", "__init__"},
]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def ours(path: Path) -> set[str]:
    found = {name.split(".")[1] for name in imports(path) if name.startswith("uniapl.")}
    return {name for name in found if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_dependency_direction(path: Path) -> None:
    level = next((i for i, names in enumerate(LAYERS) if unit(path) in names), None)
    if unit(path) == "errors":
        assert not ours(path)
        return
    assert level is not None, f"{unit(path)} has no layer: add it to LAYERS"
    allowed = set().union(*LAYERS[: level + 1]) | {"errors"}
    assert ours(path) <= allowed
    rivals = {"rollout", "rewards", "discriminator", "teacher"}
    if unit(path) in rivals:
        assert not ours(path) & (rivals - {unit(path)})


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_who_may_import_what(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path)} | set(imports(path))
    if unit(path) == "functional":
        third_party = {name.split(".")[0] for name in imports(path)} - {"uniapl"}
        assert third_party <= {"torch", "jaxtyping"} | set(sys.stdlib_module_names)
    if unit(path) != "training":
        assert "accelerate" not in outside
        assert "torch.distributed" not in outside
    assert not outside & {"trl", "vllm", "wandb"}
    if unit(path) != "models":
        assert "peft" not in outside
    if str(path.relative_to(PACKAGE)) not in ("rewards/checkers.py", "evaluation/harness.py"):
        assert "lm_eval" not in outside


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes_and_docstrings(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            documentation = ast.get_docstring(node) or ""
            length = (node.end_lineno or 0) - node.lineno + 1 - len(documentation.splitlines())
            assert length <= 60, f"{node.name} has {length} lines"
    for node in public_definitions(tree):
        assert ast.get_docstring(node), f"{node.name} has no docstring"


MANY_FIELDS = {"MicroBatch"}
"""One field per aligned tensor."""
MANY_PARAMETERS = {"api.py": "train"}
"""What users give as objects, all by name and optional."""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_limits_of_classes_and_functions(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            parameters = [a.arg for a in arguments if a.arg not in ("self", "cls")]
            if MANY_PARAMETERS.get(path.name) != node.name:
                assert len(parameters) <= 8, f"{node.name} has {len(parameters)} parameters"
        if isinstance(node, ast.ClassDef) and unit(path) != "config" and node.name not in MANY_FIELDS:
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            methods = [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
            assert len(fields) <= 10, f"{node.name} has {len(fields)} fields"
            assert len(methods) <= 10, f"{node.name} has {len(methods)} methods"


def public_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions, classes and methods whose names, and whose class's name, do not begin with an underscore."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (n for n in node.body if isinstance(n, kinds) and not n.name.startswith("_"))


def test_help_is_light() -> None:
    """`uniapl --help` imports none of the heavy libraries."""
    code = (
        "import sys; from uniapl.cli import run; import uniapl; assert run(['--help']) == 0; "
        "heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'pydantic'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_recipe_help_needs_no_torch() -> None:
    code = (
        "import sys; from uniapl.config.resolve import resolve\n"
        "try: resolve({}, ['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_public_names_exist() -> None:
    import uniapl

    for name in uniapl.__all__:
        assert getattr(uniapl, name) is not None
    assert {name for names in uniapl._EXPORTS.values() for name in names} == set(uniapl.__all__)
    with pytest.raises(AttributeError):
        _ = uniapl.nothing


@pytest.mark.parametrize(("document", "at_least"), [("method.md", 20), ("reliability.md", 80)])
def test_documents_name_functions_and_tests_that_exist(document: str, at_least: int) -> None:
    """Every `path:name` in it is a definition in that file."""
    text = (ROOT / "docs" / document).read_text()
    references = re.findall(r"`((?:src|tests|examples|benchmarks)/[\w/]+\.py):(\w+)`", text)
    assert len(references) >= at_least
    for path, name in references:
        assert name in set(names_defined(ROOT / path)), f"{path}:{name}"


def test_method_md_tells_the_defaults() -> None:
    """Every `name: value` in its fourth column is a key of the configuration with that default."""
    rows = [line.split(" | ") for line in (ROOT / "docs" / "method.md").read_text().splitlines()]
    cells = [row[4] for row in rows if len(row) == 6]
    told = re.findall(r"`(\w+): ([^`]+)`", " ".join(cells))
    assert len(told) > 15
    defaults = resolve({}).config.model_dump(mode="json")
    sections = [section for section in defaults.values() if isinstance(section, dict)]
    for name, value in told:
        found = [section[name] for section in (defaults, *sections) if name in section]
        assert yaml.safe_load(value) in found, f"{name}: {value}, but the default is {found}"


def names_defined(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_links_between_documents_hold() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
