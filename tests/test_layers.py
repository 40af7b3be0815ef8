"""The order of the package: a part imports only from those above it, and no two import each other."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import stepcredit

ROOT = Path(stepcredit.__file__).parent
# CONTRIBUTING.md says the same in words.
LAYERS = [
    ["errors", "imports", "section", "seeds"],
    ["options"],  # the option sections of all parts, and the settings of the demo
    ["config"],
    ["forest"],
    ["credit", "losses", "shaping"],
    ["processes"],
    ["policy"],
    ["learn"],
    ["verifiers", "samplers"],
    ["tasks"],
    ["growth"],
    ["estimators"],
    ["adapters"],
    ["demo"],
    ["plan"],
    ["display"],
    ["run"],
    ["report"],
    ["cli"],
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def part_of(module: str) -> str | None:
    """The part that a module of the package belongs to; None for the package itself."""
    words = module.split(".")[1:]
    if words and (words[-1] == "options" or words in (["demo", "recipe"], ["samplers", "params"])):
        return "options"
    return words[0] if words else None


def module_of(path: Path) -> str:
    return ".".join(["stepcredit", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(path: Path) -> list[str]:
    """Modules of the package that a file imports, those inside functions too; those for types alone left out."""
    found: list[str] = []
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        waiting += [child for child in ast.iter_child_nodes(node) if not is_type_checking(child)]
    modules = []
    for name in found:
        if name.split(".")[0] == "stepcredit":
            here = ROOT.joinpath(*name.split(".")[1:])
            is_module = here.is_dir() or here.with_suffix(".py").is_file()
            modules.append(name if is_module else name.rpartition(".")[0])
    return modules


FILES = sorted(path for path in ROOT.rglob("*.py") if path.name not in ("__main__.py",))


def test_every_part_has_a_layer():
    parts = {part_of(module_of(path)) for path in FILES} - {None}
    assert parts == LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_imported_from_below(path):
    here = part_of(module_of(path))
    if here is None:
        return
    for module in imported(path):
        there = part_of(module)
        assert there is None or LEVEL[there] <= LEVEL[here], f"{module_of(path)} imports {module}"


def test_no_parts_import_each_other():
    """Neither parts of one layer nor modules of one part; raises CycleError."""
    parts: dict[str, set[str]] = {}
    modules: dict[str, set[str]] = {}
    for path in FILES:
        here = part_of(module_of(path))
        for module in imported(path):
            there = part_of(module)
            if here and there and here != there:
                parts.setdefault(here, set()).add(there)
            if path.name != "__init__.py":
                modules.setdefault(module_of(path), set()).add(module)
    for graph in (parts, modules):
        assert list(TopologicalSorter(graph).static_order())


def test_files_are_rooms():
    """No file of more than 450 lines, unless its top says why."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 450:
            assert "lines because" in text.split('"""')[1], path
