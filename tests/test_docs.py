"""The documentation: it builds without a warning, and what it names exists."""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocstrings")
pytest.importorskip("material")

import yaml

import hf_backrazor
from hf_backrazor.cli import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
COMPARISON = DOCS / "comparison.md"
PAGES = sorted(DOCS.rglob("*.md"))
BESIDE = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=source,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    target = tmp_path_factory.mktemp("documentation") / "site"
    built = build(REPOSITORY, target)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stdout + built.stderr
    return target


class Page(HTMLParser):
    """Anchors of a page, and where it loads things from."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.loads: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if anchor := values.get("id"):
            self.anchors.add(anchor)
        if tag in ("script", "img", "iframe", "source"):
            self.loads.append(values.get("src") or "")
        if tag == "link" and values.get("rel") in ("stylesheet", "preconnect", "icon", "preload"):
            self.loads.append(values.get("href") or "")


@pytest.mark.slow
def test_every_public_name_has_an_anchor(site: Path) -> None:
    anchors = set().union(*(Page(file).anchors for file in (site / "reference").glob("*.html")))
    assert {f"hf_backrazor.{name}" for name in hf_backrazor.__all__} <= anchors


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    files = list(site.rglob("*.html"))
    assert len(files) >= len(PAGES)
    assert [load for file in files for load in Page(file).loads if "//" in load] == []


@pytest.mark.slow
@pytest.mark.parametrize("link", ["no-such-page.md", "index.md#no-such-heading"])
def test_a_dead_link_stops_the_build(tmp_path: Path, link: str) -> None:
    source = tmp_path / "source"
    (source / "docs").mkdir(parents=True)
    settings = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    (source / "mkdocs.yml").write_text(settings[: settings.index("\nnav:")], encoding="utf-8")
    page = source / "docs" / "index.md"
    page.write_text("# Title\n\n[there](index.md#title)\n")
    assert build(source, tmp_path / "site").returncode == 0
    page.write_text(f"# Title\n\n[nowhere]({link})\n")
    assert build(source, tmp_path / "site").returncode != 0


def code_blocks(page: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every block of Python."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: block.start()].count("\n") + 2, block.group(1)


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=relative)
def test_code_is_python_and_imports_what_is_public(page: Path) -> None:
    for line, block in code_blocks(page):
        try:
            tree = ast.parse(block)
        except SyntaxError as error:
            pytest.fail(f"{relative(page)}:{line + (error.lineno or 1) - 1}: {error.msg}")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "hf_backrazor":
                assert {alias.name for alias in node.names} <= set(hf_backrazor.__all__), f"{relative(page)}:{line}"


def test_there_is_code_to_check() -> None:
    assert sum(1 for page in PAGES for _ in code_blocks(page)) > 10


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=relative)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.])(?:recipes|tests|hf_backrazor|notebooks)/[\w./-]*\w", text))
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def functions_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=relative)
def test_tests_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"(tests/\w+\.py)::(\w+)", page.read_text(encoding="utf-8")))
    missing = [f"{file}::{name}" for file, name in sorted(named) if name not in functions_of(REPOSITORY / file)]
    assert missing == []


def test_every_yes_of_the_comparison_names_its_test() -> None:
    text = COMPARISON.read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    tested = {row[0] for row in rows if len(row) == 2 and "tests/" in row[1]}
    claimed = {row[0] for row in rows if len(row) > 2 and row[1].startswith("yes")}
    assert len(claimed) > 10
    assert claimed == tested


def messages_of(file: Path) -> Iterator[tuple[str, str]]:
    """Place and beginning of every message that a file warns of or raises: of its first fixed part that says much."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        warns = isinstance(node, ast.Call) and getattr(node.func, "attr", None) in ("warn", "warning_once")
        call = node if warns else node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and call.args:
            fixed = [part.value for part in ast.walk(call.args[0]) if isinstance(part, ast.Constant)]
            beginnings = [text for text in fixed if isinstance(text, str) and len(text) > 12]
            yield f"{relative(file)}:{node.lineno}", "".join(beginnings[:1]).strip(" :;'()")[:30].strip()


def test_every_message_is_explained() -> None:
    """But those of the command line, and of what only contributors call."""
    page = " ".join((DOCS / "how-to" / "troubleshooting.md").read_text(encoding="utf-8").split())
    package = REPOSITORY / "hf_backrazor"
    files = [*package.glob("*.py"), *(package / "modules").glob("*.py"), *(package / "kernels").glob("*.py")]
    found = dict(message for file in files for message in messages_of(file))
    assert len(found) > 20
    assert {place: beginning for place, beginning in found.items() if beginning not in page} == {}


def test_every_argument_of_the_command_line_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        assert f"`hf-backrazor {name}" in page
        parser = argparse.ArgumentParser(add_help=False)
        command.add_arguments(parser)
        for action in parser._actions:
            assert (action.option_strings or [action.metavar])[0] in page, f"{name}: {action.dest}"


def test_citation_and_changelog_are_of_this_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == hf_backrazor.__version__
    paper = citation["preferred-citation"]
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert paper["title"] in readme
    authors = " and ".join(f"{person['family-names']}, {person['given-names']}" for person in paper["authors"])
    assert f"author    = {{{authors}}}" in readme
    assert hf_backrazor.__version__ in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
