"""The package's wings import in one direction, and nothing imports what changes Ultralytics."""

import ast
from pathlib import Path

import pytest

import yolo_fewshot

PACKAGE = Path(yolo_fewshot.__file__).parent
BELOW_ALL = ("args", "class_names", "compat", "errors", "files", "inputs", "paths")
ORDER = [
    set(BELOW_ALL),
    {"nn"},
    {"data"},
    {"enroll"},
    {"plots"},
    {"train", "yolo"},
    {"evaluate"},
    {"demo", "pseudo_labels", "studio"},
    {"cli"},
    {"plugin"},
]
RANK = {name: i for i, names in enumerate(ORDER) for name in names}
FILES = [f for f in sorted(PACKAGE.rglob("*.py")) if "startup" not in f.parts and f != PACKAGE / "__init__.py"]


def module_of(file: Path) -> str:
    """Dotted name of a file without the package's own."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(file: Path) -> set[str]:
    """Modules of this package that a file imports, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "yolo_fewshot":
            base = node.module.partition(".")[2]
            for name in node.names:
                path = f"{base}.{name.name}".strip(".").replace(".", "/")
                found.add(path.replace("/", ".") if (PACKAGE / f"{path}.py").exists() else base)
    return found - {""}


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_a_wing_imports_only_those_below_it(file: Path):
    own = module_of(file).split(".")[0]
    assert own in RANK, f"{own} has no place in the order of the wings"
    others = [x for x in imports_of(file) if x.split(".")[0] != own and not {own, x} <= set(BELOW_ALL)]
    upwards = [x for x in others if RANK[x.split(".")[0]] >= RANK[own]]
    assert not upwards, f"{module_of(file)} imports {upwards}, which lie above or beside it"


def test_no_modules_import_each_other_in_a_circle():
    graph = {module_of(f): imports_of(f) for f in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path, name))}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
