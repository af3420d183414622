"""README and docs say what is so: Python runs, commands are understood, links lead somewhere."""

import re
import shlex
import subprocess
import sys
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


def commands(page):
    """The arguments of every command line of headrace in a page's indented blocks."""
    for line in re.findall(r"^ {4}(?:[^#\n]*[ /])?headrace (.*)", page.read_text(), re.MULTILINE):
        words = shlex.split(line, comments=True)
        if "…" not in words:
            yield words


@pytest.mark.parametrize("page", [page for page in PAGES if page != LOG], ids=lambda page: page.name)
def test_commands_are_understood(page):
    for words in commands(page):
        build_parser().parse_args(words)


def test_the_readme_has_commands():
    assert len(list(commands(ROOT / "README.md"))) > 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"", page.read_text()):
        target = "".join(link)
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"
