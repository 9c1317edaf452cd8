"""Where modules may import from, and how large they may be: read from their source by `ast`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = sorted([*ROOT.glob("*.py"), *ROOT.glob("util/**/*.py")])


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): ast.parse(path.read_text()) for path in PRODUCT}
PACKAGES = {"util", "util.video"}
DATA = {"util.kinetics", "util.loader"}


def level(module: str) -> int:
    """0 util, 1 models, 2 engines, 3 scripts."""
    kinds = ("util", "models_", "engine_")
    return next((i for i, kind in enumerate(kinds) if module.startswith(kind)), 3)


def import_statements(node: ast.AST) -> Iterator[ast.AST]:
    """Find the imports below a node that run, within functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from import_statements(ast.Module([other], []))
        else:
            yield from import_statements(child)


def imports(module: str) -> set[str]:
    """Return the project's modules that a module imports."""
    tree, found = MODULES[module], set()
    if module == "util.convert":  # its command line, a function, may import what it writes
        tree = ast.Module([x for x in tree.body if not isinstance(x, ast.FunctionDef)], [])
    for statement in import_statements(tree):
        if isinstance(statement, ast.ImportFrom):
            names = [f"{statement.module}.{alias.name}" for alias in statement.names]
            found |= {name if name in MODULES else str(statement.module) for name in names}
        elif isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
    return found & MODULES.keys() - PACKAGES


IMPORTS = {module: imports(module) for module in MODULES}


def test_imports_run_in_no_circle():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    imported = IMPORTS[module]
    assert not {other for other in imported if level(other) > level(module)}
    if module.startswith("util.video."):
        assert all(x == "util.errors" or x.startswith("util.video.") for x in imported)
    if module in ("util.args", "util.dist"):
        assert imported <= {"util.errors"}
    if module.startswith("engine_"):
        assert not imported & {*DATA, "util.checkpoint"}
        assert not {other for other in imported if other.startswith("models_")}
    if module.startswith("models_"):
        assert not imported & {*DATA, "util.args"}


def test_a_step_of_pretraining_needs_few_modules_and_its_meters_no_checkpoints():
    """Import the meters and then the engine, which needs them, in a fresh interpreter."""
    code = "import sys, util.meters; print(*sys.modules); import engine_pretrain"
    code = f"{code}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    meters, engine = ({*x.split()} & MODULES.keys() for x in run.stdout.decode().splitlines())
    assert "util.meters" in meters and meters < engine
    assert not meters & {"util.formats", "util.weights", "util.convert", "util.checkpoint"}
    assert len(engine - PACKAGES) <= 9


def count_lines(paths: list[Path]) -> dict[str, int]:
    return {str(path): len(path.read_text().splitlines()) for path in paths}


def test_sizes():
    product = count_lines(PRODUCT)
    assert sum(product.values()) <= 13600
    assert {path: lines for path, lines in product.items() if lines > 560} == {}
    assert sum(count_lines([*ROOT.glob("benchmarks/*.py")]).values()) <= 2156
    functions = [x for tree in MODULES.values() for x in ast.walk(tree)
                 if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef)]  # fmt: skip
    assert [x.name for x in functions if (x.end_lineno or 0) - x.lineno + 1 > 80] == []
