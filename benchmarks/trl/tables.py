"""Update the tables in docs/performance.md from the benchmarks' JSON files.

    python benchmarks/trl/tables.py [docs/performance]

The tables of NAME.json replace the text between `<!-- NAME -->` and `<!-- end -->`.
"""

import json
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(found: dict[str, Any]) -> str:
    m = found["machine"]
    return (
        f"{m['device']}, {m['cores']} cores, {m['threads']} threads, {m['precision']}, "
        f"{m['matmul_flops'] / 1e9:,.0f} GFLOP/s, {m['copy_bytes'] / 1e9:.1f} GB/s; torch {m['torch']}, "
        f"transformers {m['transformers']}, TRL {m['trl']}."
    )


def timed(table: dict[str, Any]) -> str:
    """Table with the time, relative time and roofline efficiency of each configuration."""
    shape = table["shape"]
    agree = f"; losses and norms agree to {table['difference']:.0e}" if "difference" in table else ""
    title = (
        f"{shape['model']}, {shape['prompts']} prompts of {shape['prompt_length']} tokens, G = "
        f"{shape['generations']}, completions of at most {shape['completion_length']} tokens, V = "
        f"{shape['vocabulary']:,}: {table['title']}{agree}"
    )
    rows = [
        [
            row["name"],
            f"{row['median']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
            f"{row['times']:.2f}",
            f"{row['of_limit']:.0%}" if row["of_limit"] else "",
        ]
        for row in table["rows"]
    ]
    text = markdown([title, "seconds", "range", "relative time", "roofline efficiency"], rows)
    for side, parts in table.get("parts", {}).items():
        text += f"\n\n{side}: " + ", ".join(f"{name} {took:.2f} s" for name, took in parts.items()) + "."
    return text


def peaks(table: dict[str, Any]) -> str:
    """Table with the peak memory of each configuration."""
    rows = [
        [
            row["name"],
            f"{row['bytes'] / 2**30:.2f} GiB",
            f"{row['bytes'] / row['weights']:.1f}",
            f"{row['seconds']:.1f}",
        ]
        for row in table["rows"]
    ]
    return markdown([table["title"], "additional memory", "relative to the weights", "seconds"], rows)


def scaling(tables: list[dict[str, Any]]) -> str:
    """Table with one row per value of an axis: times of rollouts and update in both libraries, and ratios."""
    rows: list[list[str]] = []
    for (axis, value), points in groupby(tables, key=lambda t: (t["axis"], t["value"])):
        cells: list[str] = []
        for point in points:
            ours, theirs = (row["median"] for row in point["rows"])
            cells += [f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}"]
        rows.append([f"{axis} {value:,}", *cells])
    columns = ("UniAPL", "TRL", "ratio")
    head = ["", *(f"{what}: {column}" for what in ("rollouts", "update") for column in columns)]
    return markdown(head, rows)


def startup(found: dict[str, Any]) -> str:
    """Table with the time, limit and slowest imports of each command."""
    rows = [
        [
            f"`{command}`",
            f"{min(figures['seconds']):.2f} to {max(figures['seconds']):.2f}",
            f"{min(figures['processor_seconds']):.2f} to {max(figures['processor_seconds']):.2f}",
            str(figures["limit"]),
            ", ".join(f"{package} {took:.2f}" for package, took in list(figures["imports"].items())[:4]),
        ]
        for command, figures in found["commands"].items()
    ]
    return markdown(
        ["", "seconds", "CPU seconds", "limit (seconds)", "cumulative import times (seconds)"], rows
    )


def gpu(found: dict[str, Any]) -> str:
    """Tables of one stage of the GPU check: its checks, its measurements and its targets."""
    models = ", tiny models" if found["tiny"] else ""
    parts = [f"{found['device']}, torch {found['torch']}, transformers {found['transformers']}{models}."]
    if found["checks"]:
        checks = [
            [
                c["name"],
                f"{c['value']:.2g}",
                f"{c['relation']} {c['bound']:g}",
                "yes" if c["passed"] else "**no**",
            ]
            for c in found["checks"]
        ]
        parts.append(markdown(["", "value", "bound", "passed"], checks))
    if found["rows"]:
        columns = [*dict.fromkeys(key for row in found["rows"] for key in row if key != "name")]
        rows = [[row["name"], *(cell(key, row.get(key)) for key in columns)] for row in found["rows"]]
        parts.append(
            markdown(["", *(key.replace("_", " ").replace("bytes", "GiB") for key in columns)], rows)
        )
    if found.get("targets"):
        targets = [
            [
                target["name"],
                "" if target["value"] is None else f"{target['value']:.2f}",
                f"{target['target']:g}",
                "yes" if target["met"] else "**no**",
            ]
            for target in found["targets"]
        ]
        parts.append(markdown(["", "value", "at least", "met"], targets))
    return "\n\n".join(parts)


def cell(key: str, value: Any) -> str:
    """A measured value with three digits; bytes in GiB."""
    if value is None or isinstance(value, str):
        return value or ""
    if key.endswith("bytes"):
        return f"{value / 2**30:.1f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def render(found: dict[str, Any]) -> str:
    """Markdown for the JSON file of one benchmark."""
    if found["benchmark"].startswith("gpu_"):
        return gpu(found)
    if found["benchmark"] == "startup":
        return startup(found)
    if found["benchmark"] == "scaling":
        parts = [scaling(found["tables"])]
    else:
        show = peaks if found["benchmark"] == "memory" else timed
        parts = [show(table) for table in found["tables"]]
    return "\n\n".join([machine(found), *parts])


def filled(page: str, folder: Path) -> str:
    """The page, with its tables generated from the JSON files in the folder."""

    def fresh(match: re.Match[str]) -> str:
        found = json.loads((folder / f"{match[1]}.json").read_text(encoding="utf-8"))
        return f"<!-- {match[1]} -->\n\n{render(found)}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->.*?<!-- end -->", fresh, page, flags=re.DOTALL)


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE.with_suffix("")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), source), encoding="utf-8")
