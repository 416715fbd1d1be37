"""examples/first_run.ipynb: executed as a whole, with fewer steps and shorter completions."""

from pathlib import Path

import pytest

from support.documents import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
NOTEBOOK = ROOT / "examples" / "first_run.ipynb"


def test_the_notebook_has_no_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.slow
def test_the_notebook_does_what_its_text_says(tmp_path: Path) -> None:
    text = NOTEBOOK.read_text()
    for long, short in (
        (r"\"max_steps\": 40", r"\"max_steps\": 2"),
        ("--overwrite", "--overwrite --max-completion-length 4"),
    ):
        assert text.count(long) == 1
        text = text.replace(long, short)
    notebook = nbformat.reads(text, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    rows, rewards, trained, metrics, health, compared, texts = (
        "".join(out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    )
    assert "1024 rows, 256 with a demonstration" in rows
    assert rewards == "[1.0, 0.0]", "the demonstration satisfies what is checked, the other text nothing"
    assert trained.startswith("(2,")
    assert [line.split("\t")[0] for line in metrics.splitlines()] == ["step", "1", "2"]
    assert "no warnings" in health
    assert Path(health.split("'")[1].removeprefix("file://")).is_file()
    assert "difference from task/base" in " ".join(compared.split())
    assert texts.count("base: ") == texts.count("final:") == 3
