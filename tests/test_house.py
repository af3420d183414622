"""The house rules that a machine can hold: imports go one way, names are sorted, files and functions stay small."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "headrace"
FILES = sorted(SOURCE.rglob("*.py"))
# Lower rooms first; rooms on one line may not import each other unless the order inside the line says so.
ROOMS = [
    "errors",
    "typed",
    "config",
    "text",
    "kernels",
    "parallel",
    "quantization",
    "attention",
    "model",
    "zero",
    "train",
    "cache",
    "engine",
    "speculate",
    "grammar",
    "dialects",
    "llm",
    "instance",
    "lang",
    "sim",
    "cluster",
    "route",
    "serve",
    "bench",
    "reproduce",
    "cli",
]
APART = {
    "train": {"cache", "engine", "llm"},
    "cache": {"train", "zero"},
    "engine": {"train", "zero"},
    "llm": {"train", "zero"},
}
FACADE = {"__init__", "__main__"}


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    return ".".join(["headrace", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "headrace":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("headrace.")}
    return names - {room(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    here = room(path)
    if here in FACADE:
        return
    assert here in ROOMS, f"{here} is not a room: give it a place in the order"
    for other in imported_rooms(path):
        if other in FACADE or other.startswith("_"):
            continue
        assert ROOMS.index(other) < ROOMS.index(here), f"{here} imports {other}, which stands above it"
        assert other not in APART.get(here, ()), f"{here} must know nothing of {other}"


def test_the_order_is_violated_by_a_wrong_import(tmp_path, monkeypatch):
    wrong = SOURCE / "train" / "wrong.py"
    monkeypatch.setattr(Path, "read_text", lambda self: "from headrace.llm.llm import LLM\n")
    with pytest.raises(AssertionError):
        test_imports_go_one_way(wrong)


LAYERS = ("headrace.engine.schedule", "headrace.engine.run", "headrace.engine.engine")
"""Of the engine, lowest first: a file may import from its own and those before it."""


@pytest.mark.parametrize("path", sorted((SOURCE / "engine").rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_engine_s_layers_stand_on_each_other(path):
    own = next((i for i, name in enumerate(LAYERS) if module_name(path).startswith(name)), len(LAYERS))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("headrace.engine."):
            imported = node.module or ""
            assert imported.startswith(LAYERS[: own + 1]), f"{path.name} imports {imported}, a layer above it"


def test_what_schedules_needs_no_torch():
    modules = [module_name(p) for p in sorted((SOURCE / "engine" / "schedule").rglob("*.py"))]
    heavy = "print(sorted(sys.modules.keys() & {'torch', 'numpy', 'numba'}))"
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; {heavy}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def rank(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, each by name."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_names_are_sorted_and_exist(path):
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
            assert names == sorted(names, key=rank)
            if "cuda" not in path.parts:
                loaded = importlib.import_module(module_name(path))
                assert [n for n in names if not hasattr(loaded, n)] == []


def is_alias(node: ast.stmt) -> bool:
    """Whether a statement defines a type alias: `Name = …` in CapWords, `X: TypeAlias = …` or `type X = …`."""
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.annotation).endswith("TypeAlias")
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        makes_variable = isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith(
            ("Var", "ParamSpec")
        )
        return isinstance(node.targets[0], ast.Name) and not makes_variable
    return type(node).__name__ == "TypeAlias"


def defined_types(path: Path) -> list[str]:
    """Public classes and type aliases at the top level of a module."""
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names.append(node.name)
        elif is_alias(node):
            alias: Any = node  # `type X = …` is a node of Python 3.12
            target = alias.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None) or alias.name
            names.append(target.id)
    return [name for name in names if name[0].isupper() and not name.isupper()]


def repeated_types(files: list[Path]) -> dict[str, list[str]]:
    """{name: its modules} of every public class or type alias that more than one module defines."""
    found: dict[str, list[str]] = {}
    for path in files:
        for name in defined_types(path):
            found.setdefault(name, []).append(module_name(path).removeprefix("headrace."))
    return {name: modules for name, modules in found.items() if len(modules) > 1}


def test_a_type_s_name_stands_for_one_thing():
    assert repeated_types(FILES) == {}


def test_a_second_type_of_a_name_is_found(monkeypatch):
    text = "Var = TypeVar('Var')\nLIMIT = 3\nIds = int\nText: TypeAlias = str\nclass Row: ...\nclass _Own: ...\nx = 1\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    files = [SOURCE / "text" / "one.py", SOURCE / "train" / "two.py"]
    assert repeated_types(files) == {name: ["text.one", "train.two"] for name in ("Ids", "Text", "Row")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450, "a room is missing"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None and node.end_lineno - node.lineno + 1 <= 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_product_imports_no_peer(path):
    for node in ast.walk(ast.parse(path.read_text())):
        module = getattr(node, "module", None) or ""
        names = [module, *(a.name for a in getattr(node, "names", ()) if isinstance(node, ast.Import))]
        assert not {n.split(".")[0] for n in names} & {"transformers", "openai", "vllm", "pickle"}


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    headrace = importlib.import_module("headrace")
    assert headrace.__version__ == project["version"]
    assert re.search(rf"^## {re.escape(project['version'])}", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """Modules of headrace that a file imports, those under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {full if (full := f"{node.module}.{a.name}") in known else node.module for a in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known - {module_name(path)}


def test_no_modules_import_each_other():
    """What remains when files that import nothing of the rest, or are not imported by it, go again and again."""
    known = {module_name(path) for path in FILES}
    left = {module_name(path): imported_modules(path, known) for path in FILES}
    while free := [
        n for n, imports in left.items() if not imports & left.keys() or not any(n in i for i in left.values())
    ]:
        for name in free:
            del left[name]
    assert sorted(left) == []
