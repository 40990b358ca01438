"""The C library under the address and undefined-behaviour sanitizers, on random shapes, and built in other ways."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "hf_backrazor" / "kernels" / "native"
SOURCES = [str(path) for path in sorted(NATIVE.glob("*.c")) if path.name != "module.c"]
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
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


AS_LIBRARY = """
import ctypes, sys
import hf_backrazor.kernels.library as library
library._share_openmp()
native = ctypes.CDLL(sys.argv[1])
library.load = lambda: native
import pytest
sys.exit(pytest.main([sys.argv[2], "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="for processors of this family")
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3"])
def test_older_processors_give_the_same(level: str, tmp_path: Path) -> None:
    """What runs where there is no AVX-512, or no AVX2 either: all of test_kernels.py, with a library built for that."""
    library = tmp_path / "native.so"
    flags = [*FLAGS, f"-march={level}", "-DHF_BACKRAZOR_ONE_TARGET", "-fopenmp", "-shared", "-fPIC"]
    sources = [*SOURCES, str(NATIVE / "module.c"), f"-I{sysconfig.get_path('include')}"]
    subprocess.run([compiler, *flags, *sources, "-o", str(library), "-lm"], check=True)
    tests = ROOT / "tests" / "test_kernels.py"
    run = subprocess.run([sys.executable, "-c", AS_LIBRARY, str(library), str(tests)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


TRAIN = """
import warnings, torch
from transformers import BertConfig, BertForSequenceClassification
import hf_backrazor
from hf_backrazor import RazorConfig, get_razor_model, measure_saved_bytes
torch.manual_seed(0)
size = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256, "num_hidden_layers": 2}
model = get_razor_model(BertForSequenceClassification(BertConfig(vocab_size=99, **size))).train()
batch = {"input_ids": torch.randint(99, (8, 32)), "labels": torch.randint(2, (8,))}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        torch.manual_seed(1)
        model.zero_grad()
        model(**batch).loss.backward()
print(hf_backrazor.__file__)
print(sum("not available" in str(warning.message) for warning in caught))
print(measure_saved_bytes(model, **batch).total)
print(*(f"{p.grad.norm():.5f}" for p in model.parameters() if p.grad is not None))
"""


def train(folder: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    run = subprocess.run(
        [sys.executable, "-c", TRAIN], check=True, capture_output=True, text=True, cwd=folder, env=environment
    )
    return run.stdout.splitlines()


@pytest.mark.slow
def test_installs_and_trains_without_a_compiler(tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(
        ROOT / "hf_backrazor", tmp_path / "hf_backrazor", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "CC": "false"},
    )
    assert not list(tmp_path.rglob("*.so"))
    there, notices, *results = train(tmp_path)
    assert Path(there).is_relative_to(tmp_path)
    assert notices == "1"
    here, no_notices, *expected = train(ROOT)
    assert Path(here).is_relative_to(ROOT)
    assert no_notices == "0"
    assert results == expected
