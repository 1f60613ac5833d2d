"""The architecture, as assertions: standard library only, well under a second but for the two subprocesses."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sgl_diffusion"
LAYERS = ["kernels", "models", "runtime", "bench", "server", "cli"]  # low to high
MAY_NOT_IMPORT = {(face, room) for face in ("cli", "server") for room in ("kernels", "models")}
LINES = {"kernels": 400, "models": 600, "runtime": 500, "bench": 350, "server": 350, "cli": 350}  # of one file
FUNCTION_LINES = 80
CLASS_LINES = 250
BROAD_EXCEPT = {  # the process boundaries, and the thread boundary of a foreign pipeline
    "cli/main.py",
    "server/worker.py",
    "runtime/parallel/launch.py",
    "runtime/diffusers_backend.py",
}


@cache
def modules() -> tuple[tuple[str, Path, ast.Module], ...]:
    files = [(top, path) for top in LAYERS for path in sorted((ROOT / top).rglob("*.py"))]
    return tuple((top, path, ast.parse(path.read_text(encoding="utf-8"))) for top, path in files)


def imports(path: Path, tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Absolute dotted names a file imports, function-local ones included, those under TYPE_CHECKING not."""
    checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    here = (PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(tree):
        if id(node) in checking:
            continue
        if isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) + "." if node.level else ""
            stem = base + (node.module or "")
            yield from ((f"{stem}.{a.name}", node.lineno) for a in node.names)


def name_of(path: Path) -> str:
    dotted = ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts))
    return dotted.removesuffix(".__init__")


def test_imports_point_down() -> None:
    bad = []
    for top, path, tree in modules():
        for name, line in imports(path, tree):
            parts = name.split(".")
            if parts[0] in LAYERS:
                bad.append(f"{path}:{line} bare import {name}; say {PACKAGE}.{name}")
            if parts[0] == PACKAGE and len(parts) > 1 and parts[1] in LAYERS:
                up = LAYERS.index(parts[1]) > LAYERS.index(top)
                if up or (top, parts[1]) in MAY_NOT_IMPORT:
                    bad.append(f"{path.relative_to(ROOT)}:{line} {top} may not import {parts[1]}")
    assert not bad, "\n".join(bad)


def test_no_import_cycles() -> None:
    """Local imports count: they hide a cycle, they do not remove it."""
    names = {name_of(path) for _, path, _ in modules()}
    graph: dict[str, set[str]] = {}
    for _, path, tree in modules():
        found = {n if n in names else n.rpartition(".")[0] for n, _ in imports(path, tree)}
        graph[name_of(path)] = (found & names) - {name_of(path)}
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for below in sorted(graph[module]):
                visit(below, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])


def test_files_functions_and_classes_stay_small() -> None:
    over = []
    for top, path, tree in modules():
        where = path.relative_to(ROOT)
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LINES[top]:
            over.append(f"{where}: {lines} lines, at most {LINES[top]}")
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                triton = any("jit" in ast.unparse(d) for d in node.decorator_list)
                limit = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
                if size > limit and not triton:
                    over.append(f"{where}:{node.lineno} {node.name}: {size} lines, at most {limit}")
    assert not over, "\n".join(over)


def test_every_package_ships() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join((PACKAGE, *init.parent.relative_to(ROOT).parts))
        for top in LAYERS
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == found | {PACKAGE}
    assert set(setuptools["package-dir"]) == found | {PACKAGE}


def test_family_names_stay_home() -> None:
    """`git grep -il NAME` answers: the family's file, the catalog line, the embedded model's training, tests, docs."""
    from sgl_diffusion.models.catalog import FAMILIES

    homes = {line.partition(":")[0].rpartition(".")[2] for line in FAMILIES.values()}
    bad = [
        f"{path.relative_to(ROOT)} mentions {name}"
        for top, path, _ in modules()
        for name in homes
        if top != "models" and re.search(rf"\b{name}(?![a-z])", path.read_text(encoding="utf-8").lower())
    ]
    assert not bad, "\n".join(bad)


def test_broad_except_only_at_the_boundaries() -> None:
    bad = []
    for _, path, tree in modules():
        where = str(path.relative_to(ROOT))
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and where not in BROAD_EXCEPT:
                name = getattr(node.type, "id", None)
                if node.type is None or name in {"Exception", "BaseException"}:
                    bad.append(f"{where}:{node.lineno}")
    assert not bad, "\n".join(bad)


def test_removed_triton_api_and_stray_prints_are_not_used() -> None:
    bad = []
    for top, path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                if call in ("tl.make_block_ptr", "tl.advance", "triton.autotune"):
                    bad.append(f"{where} {call}")
                if call == "print" and top not in ("cli", "bench") and path.parent.name != "embedded":
                    bad.append(f"{where} print")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "module", ["cli.main", "cli.generate", "cli.serve", "cli.flags", "runtime.args", "models.catalog", "server.run"]
)
def test_the_command_line_loads_without_torch(module: str) -> None:
    code = f"import sys, {PACKAGE}.{module}; sys.exit(bool({{'torch', 'triton', 'diffusers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_a_native_run_does_without_diffusers() -> None:
    """It takes a second to import."""
    code = (
        f"import sys; from {PACKAGE} import Engine, SamplingParams, ServerArgs\n"
        "request = SamplingParams(prompt=['a red circle'], num_inference_steps=1, save_output=False)\n"
        "Engine.load(ServerArgs(device='cpu')).run(request)\n"
        "sys.exit('diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_the_facade_loads_names_on_demand() -> None:
    code = "import sys, sgl_diffusion; from sgl_diffusion import ServerArgs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
    import sgl_diffusion

    for name in sgl_diffusion.__all__:
        assert getattr(sgl_diffusion, name).__name__ == name


def test_our_kernels_folder_does_not_shadow_hugging_face() -> None:
    """`python -m pytest` puts the repository on sys.path; run `pytest`, or set PYTHONSAFEPATH=1."""
    spec = find_spec("kernels")
    assert spec is None or not (spec.origin or "").startswith(str(ROOT)), spec
