"""The house: which way imports go, and that all but lab/ works without lab/."""
import ast
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "engine": {"engine"},
    "book": {"book", "engine"},
    "lab": {"book", "engine", "lab"},
    "fixtures": {"book", "engine", "fixtures"},
    "tests": {"book", "engine", "fixtures"},
    "tests of lab": {"book", "engine", "fixtures", "lab"}}


def room(tree: Path, name: str) -> str:
    """The room of a file: a folder, the book at the top level, or one of the three kinds of files in tests/."""
    path = Path(name)
    if path.name.startswith("test_"):
        module = path.name.removeprefix("test_")
        return "tests of lab" if module == "docs.py" or (tree / "lab" / module).exists() else "tests"
    return {".": "book", "tests": "fixtures"}.get(str(path.parent), str(path.parent))


def imports(tree: Path) -> dict[str, set[str]]:
    """{file: the files of the tree that it imports}, wherever in the file. ruff finds relative imports."""
    files = {}
    for folder in (".", "engine", "lab", "tests"):
        for path in tree.glob(f"{folder}/*.py"):
            name = path.relative_to(tree).as_posix()
            module = name.removesuffix(".py").removeprefix("tests/").replace("/", ".")
            files[module] = name
    graph = {}
    for name in files.values():
        modules = set()
        for node in ast.walk(ast.parse((tree / name).read_text())):
            if isinstance(node, ast.Import):
                modules.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module)
                modules.update(f"{node.module}.{alias.name}" for alias in node.names)
        graph[name] = {files[module] for module in modules if module in files}
    return graph


def wrong_imports(tree: Path) -> list[str]:
    """A line for each import of a room that the file's own room does without, and for a circle."""
    graph = imports(tree)
    wrong = []
    for name, targets in graph.items():
        for target in targets:
            if room(tree, target) not in MAY_IMPORT[room(tree, name)]:
                wrong.append(f"{name} imports {target}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append("a circle: " + " <- ".join(error.args[1]))
    return wrong


def test_imports_go_one_way():
    assert wrong_imports(ROOT) == []
    graph = imports(ROOT)
    assert {"grpo.py", "engine/batches.py"} <= graph["train.py"]        # else nothing would be wrong with nothing
    assert "tests/conftest.py" in graph["tests/test_train.py"]


@pytest.mark.parametrize("name, text, problem", [
    ("engine/video.py", "import grpo", "engine/video.py imports grpo.py"),
    ("engine/video.py", "def f():\n    from lab import plan", "engine/video.py imports lab/plan.py"),
    ("train.py", "import lab.plan", "train.py imports lab/plan.py"),
    ("tests/conftest.py", "from lab.plan import x", "tests/conftest.py imports lab/plan.py"),
    ("tests/test_grpo.py", "from lab import plan", "tests/test_grpo.py imports lab/plan.py"),
    ("tests/test_grpo.py", "from test_plan import x", "tests/test_grpo.py imports tests/test_plan.py"),
    ("grpo.py", "if True:\n    import os, train as other", "a circle: "),
])
def test_wrong_imports_are_found(tmp_path, name, text, problem):
    texts = {
        "grpo.py": "import engine.video",
        "train.py": "import grpo",
        "engine/video.py": "import os",
        "lab/plan.py": "from engine import video\nimport train",
        "tests/conftest.py": "import train",
        "tests/test_plan.py": "from conftest import x\nfrom lab import plan",
        "tests/test_docs.py": "import lab.plan"}
    for file, content in [*texts.items(), (name, text)]:
        assert wrong_imports(tmp_path) == []
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    assert wrong_imports(tmp_path)[0].startswith(problem)


@pytest.mark.processes
def test_the_rest_works_without_lab(tmp_path, monkeypatch):
    """In a copy without lab/ and its tests every test is collected, with what it imports, and the
    tests of train, evaluate, ground and toy pass."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "lab"))
    for path in copy.glob("tests/test_*.py"):
        if room(ROOT, f"tests/{path.name}") == "tests of lab":
            path.unlink()
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)    # the tests in the copy are no part of this run

    def run(*words: str) -> None:
        subprocess.run([sys.executable, *words], cwd=copy, check=True)

    run("train.py", "--help")
    run("-m", "pytest", "-q", "-n", "0", "--collect-only")
    run("-m", "pytest", "-q", "-n", "0", *(f"tests/test_{name}.py" for name in ("train", "evaluate", "ground", "toy")))
