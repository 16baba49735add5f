"""Imports run downwards: each room of the package may use those below it, in this order, and no other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import peft_tsd

ROOT = Path(peft_tsd.__file__).parent

# From the ground up. `__init__` is the package's face.
FLOORS = (
    "errors", "directions", "pages", "files", "distributed", "models", "tuner", "dash", "schedule", "export",
    "registration",
    "recipes", "runs", "explore", "language", "tasks", "diffusion", "compare", "cli", "__main__", "__init__",
)  # fmt: skip

# What may be imported where it is used: packages that an extra brings, and a module that Windows lacks.
OPTIONAL = {
    "resource", "bitsandbytes", "datasets", "diffusers", "gguf", "matplotlib", "PIL", "plotly", "pyarrow",
    "reasoning_gym", "scipy", "sklearn", "trl",
}  # fmt: skip

LONGEST = 400


def modules() -> list[str]:
    return sorted(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in ROOT.rglob("*.py"))


def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def imported(module: str, node: ast.ImportFrom) -> Iterator[str]:
    """The modules of the package that a relative import names."""
    package = module.split(".")[: -node.level]
    base = [*package, *(node.module.split(".") if node.module else [])]
    for alias in node.names:
        for path in (".".join([*base, alias.name]), ".".join([*base, alias.name, "__init__"])):
            if (ROOT / f"{path.replace('.', '/')}.py").is_file():
                yield path
                break
        else:
            whole = ".".join(base)
            yield whole if (ROOT / f"{whole.replace('.', '/')}.py").is_file() else ".".join([*base, "__init__"])


def arrows(module: str) -> set[str]:
    """What a module imports of the package, anywhere in it."""
    nodes = [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.ImportFrom) and node.level]
    return {other for node in nodes for other in imported(module, node)} - {module}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_room_has_its_floor() -> None:
    assert {room(module) for module in modules()} == set(FLOORS)


def test_imports_run_downwards() -> None:
    up = [
        f"{module} -> {other}"
        for module in modules()
        for other in arrows(module)
        if FLOORS.index(room(other)) > FLOORS.index(room(module))
    ]
    assert not up, "\n".join(["imports that run up:", *up])


def test_float64_is_asked_of_a_tensor_in_one_place() -> None:
    """Apple's MPS has none: `as_double` knows."""
    asked = [
        module
        for module in modules()
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "double"
    ]
    assert asked == ["directions.spectrum"]


def test_there_is_no_circle() -> None:
    below = {module: arrows(module) for module in modules()}
    while free := [module for module, others in below.items() if not others & below.keys()]:
        for module in free:
            del below[module]
    assert not below, f"modules that import each other, directly or not: {sorted(below)}"


@pytest.mark.parametrize("module", modules())
def test_no_import_is_hidden_in_a_function(module: str) -> None:
    tree = tree_of(module)
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    names = {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    names = {"." * node.level if node.level else str(node.module).split(".")[0]}
                else:
                    continue
                assert names <= OPTIONAL, f"{module}, line {node.lineno}: {names - OPTIONAL}"


@pytest.mark.parametrize(
    "path",
    [
        p
        for root in (ROOT, Path(__file__).parent)
        for p in root.rglob("*")
        if p.suffix in {".py", ".js", ".css", ".html"}
    ],
    ids=str,
)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
