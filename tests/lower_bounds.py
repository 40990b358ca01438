"""The tests with the oldest versions that `pyproject.toml` allows, in a virtual environment made for them.

    python -m tests.lower_bounds                          all but what needs other libraries
    python -m tests.lower_bounds tests/test_functional.py any arguments of pytest

torch comes from PyPI with its CUDA libraries: some 6 GB, in `.venv-oldest`, which may be deleted afterwards.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import tomllib

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-oldest"
TOOLS = ("pytest", "pytest-xdist", "hypothesis")


def oldest(requirement: str) -> str:
    """The requirement with its lower bound as the version: `torch>=2.6,<3` -> `torch==2.6`."""
    name, version = re.match(r"([\w.-]+)\s*[>=]=\s*([\w.]+)", requirement).groups()
    return f"{name}=={version}"


def requirements() -> list[str]:
    """What the package, the recipes and the tests are installed with; without the libraries of single test files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    tools = [each for each in extras["test"] if re.match(r"[\w.-]+", each)[0] in TOOLS]
    return [oldest(each) for each in (*project["dependencies"], *extras["recipes"], *tools)]


def main(arguments: list[str]) -> int:
    """Make the environment, run pytest in it, and return its exit status."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    venv.create(FOLDER, with_pip=True)
    python = FOLDER / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    found = requirements()
    print("\n".join(found))
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "oldest.txt"
        constraints.write_text("\n".join(found), encoding="utf-8")
        install = [python, "-m", "pip", "install", "-q", "-c", constraints, "-e", ".[recipes]", *TOOLS]
        subprocess.run(install, cwd=ROOT, check=True)
    tests = arguments or ["-n", "2", "--dist", "loadfile"]
    return subprocess.run([python, "-m", "pytest", *tests], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
