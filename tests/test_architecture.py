"""The shape of the code itself: who imports whom, how long files are, what must not stand in them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "nanochat", "scripts", "benchmarks", "profiling", "experiments", "tests")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package(path: Path) -> list[str]:
    """What a file's relative imports start from."""
    return list(path.relative_to(ROOT).parts[:-1])


def imports(path: Path) -> set[str]:
    """Modules imported when the file is: not those inside functions or under TYPE_CHECKING."""
    found: set[str] = set()

    def visit(body):
        for node in body:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package(path)[: len(package(path)) + 1 - node.level] if node.level else []
                source = ".".join([*above, *filter(None, [node.module])])
                found.add(source)
                found.update(f"{source}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
                visit(node.body + node.orelse)
            elif isinstance(node, ast.Try):
                visit(node.body)

    visit(ast.parse(path.read_text()).body)
    return found


GRAPH = {module(path): imports(path) for path in FILES}


@pytest.mark.parametrize(
    "room, forbidden",
    [
        ("kernels", ("nanochat", "scripts", "benchmarks", "profiling", "experiments")),
        ("nanochat", ("scripts", "benchmarks", "profiling", "experiments")),
        ("scripts", ("scripts", "benchmarks", "profiling", "experiments")),
    ],
)
def test_arrows_go_one_way(room, forbidden):
    for name, targets in GRAPH.items():
        if name.split(".")[0] == room:
            assert not [target for target in targets if target.split(".")[0] in forbidden], name


LAB = ("recorded", "compiled", "static", "predicted")  # profiling's rooms, the uppermost first; plots and nvml below


@pytest.mark.parametrize("room", [*LAB, "plots", "nvml"])
def test_the_labs_rooms_import_downwards(room):
    above = LAB[: LAB.index(room)] if room in LAB else LAB
    for name, targets in GRAPH.items():
        if name.split(".")[:2] == ["profiling", room]:
            assert not [target for target in targets if target.startswith(tuple(f"profiling.{a}" for a in above))], name


def test_no_cycles():
    graph = {
        name: {target for target in targets if target in GRAPH and target != name and not name.startswith(target + ".")}
        for name, targets in GRAPH.items()
    }
    done: set[str] = set()

    def walk(name, path):
        assert name not in path, " → ".join([*path, name])
        if name not in done:
            for target in graph[name]:
                walk(target, [*path, name])
            done.add(name)

    for name in graph:
        walk(name, [])


def test_kernels_can_be_installed_under_another_name():
    """It imports itself by relative imports, and from elsewhere torch and Triton alone."""
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            absolute = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            absolute += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            foreign = {name.partition(".")[0] for name in absolute} - sys.stdlib_module_names
            assert foreign <= {"torch", "triton"}, path.name


def test_kernels_is_ours():
    import kernels

    assert Path(kernels.__file__).is_relative_to(ROOT)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 600
    assert ast.get_docstring(ast.parse(path.read_text())) or not path.read_text().strip() or path.parts[-2] == "tests"


def test_scripts_are_thin():
    for path in (ROOT / "scripts").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 140, path.name


def test_no_path_of_a_machine_and_no_registry_is_written_down():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    pattern = re.compile(r"/(?:work|root|home)/\w|pypi\.org|pythonhosted\.org|registry\.npmjs|deb\.debian\.org")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.exists() and path.suffix in (".py", ".sh", ".md", ".toml", ".json", "") and path != Path(__file__):
            assert not pattern.search(path.read_text()), name
