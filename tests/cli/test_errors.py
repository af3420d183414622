"""Mistakes on the command line: one line that says what to do, before anything slow is imported."""

import importlib.machinery
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from headrace import __version__
from headrace.cli import main
from headrace.cli.extras import EXTRAS, require_extra
from headrace.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SLOW = ("torch", "numba", "fastapi", "matplotlib", "huggingface_hub")


def run(capsys, *argv):
    """(exit code, standard output, standard error) of one command."""
    try:
        code: Any = main([str(a) for a in argv])
    except SystemExit as end:
        return end.code, *capsys.readouterr()
    return code, *capsys.readouterr()


def test_the_version(capsys):
    assert run(capsys, "--version") == (0, f"headrace {__version__}\n", "")


@pytest.mark.parametrize("group", [(), ("bench",), ("data",)])
def test_a_group_of_commands_alone_shows_its_help(capsys, group):
    code, out, err = run(capsys, *group)
    assert (code, err) == (0, "") and out == run(capsys, *group, "--help")[1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--prot"], "headrace: there is no flag --prot (see headrace --help)"),
        (["--versoin"], "headrace: there is no flag --versoin; did you mean --version? (see headrace --help)"),
        (["serv", "x"], "did you mean serve? (see headrace --help)"),
        (["bench", "srve"], "did you mean serve? (see headrace bench --help)"),
        (["serve", "x", "--prt", "3"], "headrace serve: there is no flag --prt; did you mean --port?"),
        (["serve", "--prt=3"], "headrace serve: there is no flag --prt; did you mean --port?"),
        (["serve", "x", "-p", "3"], "headrace serve: there is no flag -p"),
        (["serve", "x", "y"], "headrace serve: 'y' is one argument too many (see headrace serve --help)"),
        (["generate", "x", "--temprature", "1"], "did you mean --temperature? (see headrace generate --help)"),
        (["bench", "serve", "--raet", "1"], "did you mean --rate? (see headrace bench serve --help)"),
        (["data", "build", "x", "--uot", "y"], "did you mean --out? (see headrace data build --help)"),
        (["train", "x", "--sett", "a.b=1"], "did you mean --set? (see headrace train --help)"),
        (["serve", "x", "--scheduling-policy", "fcsf"], "did you mean fcfs?"),
        (["serve"], "headrace serve: the following arguments are required: model"),
    ],
)
def test_a_wrong_word_gets_a_guess_from_its_own_command(capsys, argv, says):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1


def test_values_that_look_like_flags_are_values(capsys):
    code, _, err = run(capsys, "generate", "/nowhere", "--prompt", "-- a dash", "--presence-penalty", "-1")
    assert code == 2 and "/nowhere is neither a folder" in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("serve /nowhere", "/nowhere is neither a folder"),
        ("serve EMPTY", "config.json does not exist"),
        ("serve EMPTY --port 99999", "port=99999"),
        ("serve EMPTY --host 0.0.0.0", "--api-key"),
        ("serve EMPTY --block-size 12", "power of two"),
        ("generate /nowhere --prompt x", "/nowhere is neither a folder"),
        ("generate EMPTY --prompt x --temperature -1", "temperature"),
        ("generate EMPTY --prompt x", "config.json does not exist"),
        ("generate ODD --prompt x", "architecture"),
        ("chat /nowhere", "/nowhere is neither a folder"),
        ("chat EMPTY --top-p 7", "top_p"),
        ("train /nowhere.toml --out OUT", "/nowhere.toml"),
        ("train RECIPE --out OUT --set train.stepz=3", "did you mean train.steps?"),
        ("train RECIPE --out OUT --set train.steps", "section.key=value"),
        ("train RECIPE --out OUT --set train.steps=-1", "train.steps"),
        ("train RECIPE --out RUN", "--resume"),
        ("train RECIPE --out OUT --set model.init=/nowhere", "/nowhere is neither a folder"),
        ("demo --set train.stepz=3", "did you mean train.steps?"),
        ("plan /nowhere.toml", "/nowhere.toml"),
        ("plan RECIPE --memory lots", "not an amount of memory"),
        ("plan RECIPE --measured EMPTY", "no whole snapshot"),
        ("export /nowhere OUT", "/nowhere holds no whole snapshot"),
        ("export /nowhere/step-00000001 OUT", "snapshot.json is missing"),
        ("bench serve --url http://127.0.0.1:1 --trace /nowhere", "/nowhere cannot be read"),
        ("data build /nowhere.txt --out OUT", "no such file"),
    ],
)
def test_an_error_that_needs_no_model_imports_nothing_slow(tmp_path, argv, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text(json.dumps({"architectures": ["WhisperModel"]}))
    (tmp_path / "run/hf").mkdir(parents=True)
    places = {"EMPTY": "empty", "ODD": "odd", "OUT": "out", "RUN": "run"}
    words = [str(tmp_path / places[w]) if w in places else w for w in argv.split()]
    words = [str(ROOT / "recipes/demo.toml") if w == "RECIPE" else w for w in words]
    script = f"import sys\nfrom headrace.cli import main\ncode = main({words})\n"
    script += f"print(sorted(sys.modules.keys() & {set(SLOW)}))\nraise SystemExit(code)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
    assert done.stdout == "[]\n" and not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys, tinyworld_checkpoint, tmp_path):
    found = importlib.machinery.PathFinder.find_spec
    missing = {"fastapi", "tensorboardX"}

    def find_spec(name, *arguments):
        return None if name in missing else found(name, *arguments)

    monkeypatch.setattr("importlib.machinery.PathFinder.find_spec", find_spec)
    for name in missing:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    train = ("train", ROOT / "recipes/demo.toml", "--out", tmp_path / "run")
    for argv, says in (
        (("serve", tinyworld_checkpoint), 'headrace serve needs fastapi: pip install "headrace[serve]"'),
        (("chat", "--url", "http://127.0.0.1:1"), 'headrace chat --url needs fastapi: pip install "headrace[serve]"'),
        (train, 'headrace train needs tensorboardX: pip install "headrace[train]"'),
        (("demo", "--once"), 'headrace demo needs tensorboardX: pip install "headrace[train]"'),
    ):
        assert run(capsys, *argv) == (2, "", f"headrace: {says}\n")
    require_extra("reproduce", "reproduce")
    with pytest.raises(ConfigError, match="headrace x needs fastapi"):
        require_extra("x", "serve")


def test_the_extras_are_those_of_pyproject():
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        assert sorted(packages.values()) == sorted(name.split(">=")[0] for name in optional[extra])
    assert f"headrace[{','.join(EXTRAS)}]" in optional["dev"]
