"""README and docs say what is so: Python runs, commands are understood, links lead somewhere."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LOG = ROOT / "docs" / "LOG.md"
"""It also keeps commands of earlier days."""


def test_the_python_of_the_readme_runs(tinyworld_checkpoint, tmp_path):
    [block] = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "runs/demo").mkdir(parents=True)
    (tmp_path / "runs/demo/hf").symlink_to(tinyworld_checkpoint)
    (tmp_path / "readme.py").write_text(block)
    command = [sys.executable, "-W", "error", "readme.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Once upon a time"), done.stderr


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every command line of headrace in a page's indented blocks."""
    for line in re.findall(r"^ {4}(?:[^#\n]*[ /])?headrace (.*)", page.read_text(), re.MULTILINE):
        words = shlex.split(line, comments=True)
        if "…" not in words:
            yield words


@pytest.mark.parametrize("page", [page for page in PAGES if page != LOG], ids=lambda page: page.name)
def test_commands_are_understood(page):
    for words in commands(page):
        assert callable(build_parser().parse_args(words).run), words


@pytest.mark.parametrize("file", ["Dockerfile", "headrace.service"])
def test_a_deployment_s_command_is_understood(file):
    lines = (ROOT / "deploy" / file).read_text().splitlines()
    found = [shlex.split(line.partition("headrace serve ")[2]) for line in lines if "headrace serve " in line]
    assert [build_parser().parse_args(["serve", *words]).model[-5:] for words in found] == ["MODEL"]


def test_the_dockerfile_copies_what_is_there():
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied) and {name.split("/")[0] for name in copied} == allowed


def test_the_readme_has_commands():
    assert len(list(commands(ROOT / "README.md"))) > 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"", page.read_text()):
        target = "".join(link)
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"
