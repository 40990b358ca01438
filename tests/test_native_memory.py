"""The C library under the address and undefined-behaviour sanitizers, on random shapes, and built in other ways."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "hf_backrazor" / "kernels" / "native"
SOURCES = [str(path) for path in sorted(NATIVE.glob("*.c")) if path.name != "module.c"]
SANITIZE = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

compiler = shutil.which("gcc") or shutil.which("cc")
pytestmark = pytest.mark.skipif(compiler is None, reason="no C compiler here")


def build(folder: Path, *flags: str) -> str:
    program = str(folder / "fuzz")
    driver = str(ROOT / "tests" / "fuzz_native.c")
    command = [compiler, *flags, "-std=gnu11", "-ffp-contract=off", "-I", str(NATIVE), driver, *SOURCES, "-lm"]
    subprocess.run([*command, "-o", program], check=True)
    return program


@pytest.mark.parametrize("openmp", [["-fopenmp"], []], ids=["openmp", "one thread"])
def test_sanitizers_find_nothing(tmp_path: Path, openmp: list[str]) -> None:
    program = build(tmp_path, *SANITIZE, *openmp, "-DHF_BACKRAZOR_ONE_TARGET")
    run = subprocess.run([program, "400", "1"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "400 cases\n"


def test_the_sanitizers_are_on(tmp_path: Path) -> None:
    """A read beyond a buffer is found: the test above can fail."""
    source = tmp_path / "beyond.c"
    source.write_text(
        "#include <stdlib.h>\nint main(int c, char **v) { (void)v; return ((char *)malloc(4))[3 + c]; }\n"
    )
    subprocess.run([compiler, *SANITIZE, str(source), "-o", str(tmp_path / "beyond")], check=True)
    run = subprocess.run([str(tmp_path / "beyond")], capture_output=True, text=True)
    assert run.returncode != 0
    assert "runtime error" in run.stderr or "heap-buffer-overflow" in run.stderr


def test_compiles_without_a_warning(tmp_path: Path) -> None:
    build(tmp_path, "-O3", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-DHF_BACKRAZOR_ONE_TARGET")
