"""Write the generated parts of docs/api.md and docs/configuration.md from signatures and docstrings.

    make api

Both pages are plain Markdown, so that they are readable without the site. A line `<!-- package.name -->` is
followed by the description of that object, up to the next such line or section. With a title, as in
`<!-- package.name: title -->`, only the keys of that section of the configuration follow. All other text is
written by hand.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import griffe

from support.documents import ROOT

PAGES = (ROOT / "docs" / "api.md", ROOT / "docs" / "configuration.md")
MARKER = re.compile(r"<!-- ([\w.]+)(?:: (.+))? -->")
WIDTH = 100
"""A signature with more characters has one parameter per line."""
YAML_TYPES = {
    r"Literal\[([^]]*)\]": r"\1",
    r"\b(Path)?Text\b": "str",
    r"\b(Texts|Names|Paths)\b": "list[str]",
    r"\b(Positive|Fraction)Interval\b": "two floats",
    r"tuple\[NonNegativeFloat.*\]": "three floats",
    r"tuple\[([^.]+), \.\.\.\]": r"list[\1]",
    r"\bRewardFunctionConfig\b": "str or dict",
    r"\bNone\b": "null",
}
"""Parts of an annotation -> what they are in a recipe."""
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@cache
def package(name: str, search_path: Path) -> griffe.Module:
    """A package as griffe reads it, without importing it."""
    # A "Returns:" is one text.
    options: Any = {"returns_multiple_items": False, "returns_named_value": False}
    loader = griffe.GriffeLoader(
        search_paths=[search_path], docstring_parser="google", docstring_options=options
    )
    return loader.load(name)  # type: ignore[return-value]


def updated(page: str, search_path: Path) -> str:
    """The page with the text after each marker generated again."""
    lines: list[str] = []
    generated = False
    for line in page.splitlines():
        marker = MARKER.fullmatch(line)
        generated = bool(marker) or (generated and not line.startswith("## "))
        if marker:
            lines += [line, "", *described(marker[1], marker[2], search_path)]
        elif not generated:
            lines.append(line)
    return "\n".join(lines).rstrip() + "\n"


def described(path: str, title: str | None, search_path: Path) -> Iterator[str]:
    """The lines that describe an object, with an empty line at the end.

    Raises:
        LookupError: There is no such object.
    """
    name, _, rest = path.partition(".")
    try:
        found = package(name, search_path)[rest]
    except KeyError:
        raise LookupError(f"{path}: there is no such object") from None
    yield from [f"### `{title or path}`", ""]
    if title:
        yield from _docstring(found.docstring)
        yield from _table([_key_row(member) for member in _public(found) if _is_key(member)])
        return
    yield from _body(found)
    for member in _public(found):
        if found.is_module or member.is_function:
            yield from [f"#### `{member.name if found.is_module else f'{found.name}.{member.name}'}`", ""]
            yield from _body(member)
            for method in _public(member):
                if method.is_function:
                    yield from [f"##### `{member.name}.{method.name}`", "", *_body(method)]


def _body(found: griffe.Object | griffe.Alias) -> Iterator[str]:
    """Signature, docstring and attributes of one object."""
    yield from _signature(found)
    yield from _docstring(found.docstring)
    if found.is_class:
        initial = found.members.get("__init__")
        yield from _docstring(initial.docstring if initial is not None else None)
        yield from _table([_row(member) for member in _public(found) if member.is_attribute])


def _public(found: griffe.Object | griffe.Alias) -> list[griffe.Object]:
    """What an object defines itself, without private names and what it imports."""
    members = [member for member in found.members.values() if not member.is_alias]
    public = [member for member in members if not member.name.startswith("_")]
    # A name of a module without a docstring is an abbreviation.
    return [m for m in public if m.docstring or (found.is_class and m.is_attribute)]  # type: ignore[misc]


def _signature(found: griffe.Object | griffe.Alias) -> list[str]:
    function = found.members.get("__init__") if found.is_class else found
    # The parameters of a dataclass are in the table of its attributes.
    if function is None or not function.is_function or "dataclass" in found.labels:
        return []
    parameters: list[str] = []
    keyword_only = False
    for parameter in function.parameters:
        if parameter.name in ("self", "cls"):
            continue
        variadic = {"variadic positional": "*", "variadic keyword": "**"}.get(str(parameter.kind.value), "")
        if parameter.kind is griffe.ParameterKind.keyword_only and not keyword_only:
            keyword_only = True
            if not any(text.startswith("*") for text in parameters):
                parameters.append("*")
        text = f"{variadic}{parameter.name}"
        if parameter.annotation is not None:
            text += f": {parameter.annotation}"
        if parameter.default is not None and not variadic:
            text += f" = {parameter.default}" if parameter.annotation is not None else f"={parameter.default}"
        parameters.append(text)
    result = f" -> {function.returns}" if found.is_function and function.returns is not None else ""
    line = f"{found.name}({', '.join(parameters)}){result}"
    lines = [line]
    if len(line) > WIDTH:
        lines = [f"{found.name}(", *(f"    {text}," for text in parameters), f"){result}"]
    return [*(f"    {line}" for line in lines), ""]


def _docstring(docstring: griffe.Docstring | None) -> Iterator[str]:
    for section in docstring.parsed if docstring is not None else ():
        match section.kind:
            case griffe.DocstringSectionKind.text:
                yield from [*_plain(section.value).splitlines(), ""]
            case griffe.DocstringSectionKind.parameters:
                yield from _listed("Arguments", [(item.name, item.description) for item in section.value])
            case griffe.DocstringSectionKind.raises:
                items = [(str(item.annotation), item.description) for item in section.value]
                yield from _listed("Raises", items)
            case griffe.DocstringSectionKind.returns:
                (item,) = section.value
                # griffe takes the words before a colon for a type.
                given = str(item.annotation) != str(docstring.parent.returns)  # type: ignore[union-attr]
                text = f"{item.annotation}: {item.description}" if given else item.description
                yield from [f"Returns: {_joined(text)}", ""]
            case griffe.DocstringSectionKind.examples:
                yield from _code("\n".join(text for _, text in section.value))
            # "Example:" in the singular.
            case griffe.DocstringSectionKind.admonition:
                yield from _code(section.value.contents)
            case other:
                raise NotImplementedError(f"a docstring has a section '{other.value}'")


def _code(text: str) -> Iterator[str]:
    yield from ["Example:", "", *(f"    {line}".rstrip() for line in text.splitlines()), ""]


def _listed(title: str, items: list[tuple[str, str]]) -> Iterator[str]:
    yield from [f"{title}:", "", *(f"- `{name}`: {_joined(text)}" for name, text in items), ""]


def _is_key(member: griffe.Object) -> bool:
    """Whether it is a key, and not a property or a section."""
    return member.is_attribute and "property" not in member.labels and bool(member.docstring)


def _table(rows: list[tuple[str, str, str, str]]) -> Iterator[str]:
    if rows:
        yield from ["| name | type | default | description |", "|---|---|---|---|"]
        yield from ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        yield ""


def _row(attribute: griffe.Object) -> tuple[str, str, str, str]:
    default, bounds = _default(attribute)
    kind = str(attribute.annotation or "").replace(" | ", " or ")  # type: ignore[attr-defined]
    if "property" in attribute.labels:
        default, bounds = "", ", property"
    text = _joined(attribute.docstring.value) if attribute.docstring else ""
    return f"`{attribute.name}`", f"`{kind}`{bounds}" if kind else "", f"`{default}`" if default else "", text


def _key_row(key: griffe.Object) -> tuple[str, str, str, str]:
    """The row of a key, with the values as in YAML."""
    name, kind, default, text = _row(key)
    for pattern, replacement in YAML_TYPES.items():
        kind = re.sub(pattern, replacement, kind)
    try:
        default = f"`{json.dumps(ast.literal_eval(default.strip('`')))}`" if default else ""
    except ValueError:
        default = ""
    return name, kind, default, text


def _default(attribute: griffe.Object) -> tuple[str, str]:
    """The default of an attribute, and the bounds of its values if it is a pydantic field."""
    value = attribute.value  # type: ignore[attr-defined]
    if value is None:
        return "", ""
    if not isinstance(value, griffe.ExprCall) or str(value.function) not in ("Field", "field"):
        return str(value), ""
    keywords = {a.name: a.value for a in value.arguments if isinstance(a, griffe.ExprKeyword)}
    first = [a for a in value.arguments if not isinstance(a, griffe.ExprKeyword)]
    factory = keywords.get("default_factory")
    default = str(keywords.get("default", first[0] if first else "" if factory is None else f"{factory}()"))
    return default, "".join(f", {BOUNDS[name]} {keywords[name]}" for name in BOUNDS if name in keywords)


def _joined(text: str) -> str:
    return " ".join(_plain(text).split())


def _plain(text: str) -> str:
    """Markdown without roles: :func:`~uniapl.train` is `train`; `<` and `*` are themselves."""
    text = re.sub(r":\w+:`~(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    text = re.sub(r":\w+:`\.?([^`]+)`", r"`\1`", text)
    parts = re.split(r"(`[^`]*`|^    .*$)", text, flags=re.MULTILINE)
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*") for part in parts[::2]]
    return "".join(parts)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(updated(path.read_text(), ROOT / "src"))
        sys.stdout.write(f"wrote {path}\n")
