"""The house: how much stands where, which way imports go, and that the README speaks of what is there.

A check takes the root of a tree and returns what is wrong with it, a line each. Each is tried on a bad tree, too.
"""
import ast
import io
import re
import shutil
import subprocess
import tokenize
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENTRIES, LINES, METHOD_LINES = 26, 400, 300     # the most of each
METHOD = {      # draw, prompt, rollout, reward, advantage, loss: what one reads to have read the method
    "grpo.py": ["advantages", "loss", "Rollouts", "rollout", "logprobs"],
    "tasks.py": ["Task", "FORM", "TASKS", "INVERSIONS", "mask_verbs", "draw", "usable", "prepare"],
    "rewards.py": ["Reward", "verbs", "queries", "answer", "format_reward", "segment", "iou", "lone",
                   "tvg", "vc", "ar", "vd"],
    "train.py": ["main", "Pass", "sample_groups", "summarise", "take_step"]}
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def files(tree: Path) -> list[str]:
    """What belongs to a tree: the files that git tracks, or without git all that are not hidden."""
    if (tree / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "-C", tree, "ls-files", "-z"], capture_output=True, text=True)
        if listed.returncode == 0:
            return [name for name in listed.stdout.split("\0") if name and (tree / name).exists()]
    names = (path.relative_to(tree) for path in sorted(tree.rglob("*")) if path.is_file())
    return [name.as_posix() for name in names if not any(p.startswith((".", "__pycache__")) for p in name.parts)]


def code(tree: Path) -> list[str]:
    """The python files, tests aside."""
    return [name for name in files(tree) if name.endswith(".py") and not name.startswith(("tests/", "test_"))]


def parse(tree: Path, name: str) -> ast.Module:
    return ast.parse((tree / name).read_text(encoding="utf-8"))


def too_many_entries(tree: Path) -> list[str]:
    top = sorted({name.split("/")[0] for name in files(tree)})
    return [f"{len(top)} entries at the top level: {' '.join(top)}"] if len(top) > ENTRIES else []


def too_long_files(tree: Path) -> list[str]:
    sizes = {name: len((tree / name).read_text(encoding="utf-8").splitlines())
             for name in files(tree) if name.endswith(".py")}
    return [f"{name}: {size} lines" for name, size in sizes.items() if size > LINES]


def imports(tree: Path) -> dict[str, set[str]]:
    """{file: the files of the tree that it imports}, wherever in the file; tests aside."""
    known, graph = set(code(tree)), {}
    for name in sorted(known):
        found = set()
        for node in ast.walk(parse(tree, name)):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = name.split("/")[:-node.level] if node.level else []
                module = ".".join(base + [node.module] * (node.module is not None))
                found.update([module, *(f"{module}.{alias.name}".strip(".") for alias in node.names)])
        paths = {module.replace(".", "/") for module in found}
        graph[name] = {path for of in paths for path in (of + ".py", of + "/__init__.py") if path in known} - {name}
    return graph


def circles(tree: Path) -> list[str]:
    """Imports that lead back to where they began, between files and between folders."""
    between_files = imports(tree)
    folder = lambda name: str(Path(name).parent)        # "." is the top level
    between_folders = {}
    for name, targets in between_files.items():
        others = {folder(target) for target in targets} - {folder(name)}
        between_folders.setdefault(folder(name), set()).update(others)
    found = []
    for graph in (between_files, between_folders):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            found.append("a circle: " + " <- ".join(error.args[1]))
    return found


def upward(tree: Path) -> list[str]:
    """Imports of a room above: support/ may import itself only, the top level no tools/."""
    return [f"{name} imports {target}" for name, targets in imports(tree).items() for target in sorted(targets)
            if name.startswith("support/") and not target.startswith("support/")
            or "/" not in name and target.startswith("tools/")]


def defined(module: ast.Module) -> dict[str, ast.stmt]:
    """{name: statement} of functions, classes, their methods ("Reward.total") and values."""
    found = {}
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
            found.update((f"{node.name}.{inner.name}", inner) for inner in node.body
                         if isinstance(node, ast.ClassDef) and isinstance(inner, ast.FunctionDef))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update((target.id, node) for target in targets if isinstance(target, ast.Name))
    return found


def section(tree: Path, name: str, title: str) -> str:
    """A section of a text, empty where there is none."""
    path = tree / name
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text.partition(f"## {title}")[2].partition("\n## ")[0]


def missing_names(tree: Path) -> list[str]:
    """Functions and tests in the table of equations that do not exist."""
    rows = [line for line in section(tree, "docs/method.md", "Equation, function, test").splitlines()
            if line.startswith("|")]
    there = {name for path in files(tree) if re.fullmatch(r"(tests/)?test_\w+\.py", path)
             for name in defined(parse(tree, path)) if name.startswith("test_")}
    for path in code(tree):
        there.update(f"{Path(path).stem}.{name}" for name in defined(parse(tree, path)))
    named = re.findall(r"`([\w.]+)`", "\n".join(rows))
    return [f"the table names {name}" for name in named if name not in there] if named else ["there is no table"]


def wrong_map(tree: Path) -> list[str]:
    """Files that the README's tree lacks, and names of files in the README that do not exist."""
    text = (tree / "README.md").read_text(encoding="utf-8")
    drawn = re.findall(r"^    .*", section(tree, "README.md", "The tree"), re.MULTILINE)
    listed = set(re.findall(r"[\w/]+\.py", "\n".join(drawn)))
    known = [path for path in files(tree) if path.endswith(".py")]
    ends = lambda path, name: f"/{path}".endswith(f"/{name}")
    return [f"the tree lacks {path}" for path in code(tree) if not any(ends(path, name) for name in listed)] + \
        [f"README.md names {name}" for name in sorted(set(re.findall(r"[\w/]+\.py\b", text)))
         if not any(ends(path, name) for path in known)]


def lines_of_code(path: Path, names: list[str]) -> int:
    """Lines of the named functions, classes and values, without docstrings, comments and blank ones."""
    text = path.read_text(encoding="utf-8")
    module, lines = ast.parse(text), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(module):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    found = defined(module)
    wanted = set()
    for name in names:
        decorators = [decorator.lineno for decorator in getattr(found[name], "decorator_list", [])]
        wanted.update(range(min([found[name].lineno, *decorators]), found[name].end_lineno + 1))
    return len(lines & wanted)


def too_long_method(tree: Path) -> list[str]:
    counts, lost = {}, []
    for name, wanted in METHOD.items():
        lost += [f"{name} has no {each}" for each in wanted if each not in defined(parse(tree, name))]
        counts[name] = 0 if lost else lines_of_code(tree / name, wanted)
    if sum(counts.values()) >= METHOD_LINES:
        lost.append(f"the method has {sum(counts.values())} lines of code: {counts}")
    return lost


@pytest.mark.parametrize("check", [too_many_entries, too_long_files, circles, upward, missing_names, wrong_map,
                                   too_long_method])
def test_nothing_is_wrong(check):
    assert check(ROOT) == []


def test_the_tree_is_seen():
    """Else the checks would find nothing wrong with nothing."""
    graph = imports(ROOT)
    assert {"grpo.py", "engine/attention.py"} <= graph["train.py"] | graph["grpo.py"]
    assert {"train.py", "engine/launch.py", "tools/plan.py", "tools/bench.py"} <= set(code(ROOT))
    assert "tests/test_house.py" in files(ROOT) and len(files(ROOT)) > 50
    assert all(lines_of_code(ROOT / name, names) > 30 for name, names in METHOD.items())


def grow(tree: Path, **texts: str) -> Path:
    """Write files of a made-up tree; "__" in a name is a slash."""
    for name, text in texts.items():
        path = tree / (name.replace("__", "/") + (".md" if name in ("README", "docs__method") else ".py"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tree


def test_entries_are_counted(tmp_path):
    grow(tmp_path, **{f"file{i}": "" for i in range(25)}, support__one="", support__two="")
    assert too_many_entries(tmp_path) == []
    assert "27 entries" in too_many_entries(grow(tmp_path, more=""))[0]


def test_only_what_git_tracks_counts(tmp_path, monkeypatch):
    grow(tmp_path, one="", junk="")
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(shutil, "which", lambda _: "git")
    listed = subprocess.CompletedProcess([], 0, "one.py\0gone\0")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: listed)
    assert files(tmp_path) == ["one.py"]


def test_lines_are_counted(tmp_path):
    grow(tmp_path, good="x = 1\n" * 400, tests__test_bad="x = 1\n" * 401)
    assert too_long_files(tmp_path) == ["tests/test_bad.py: 401 lines"]


@pytest.mark.parametrize("back", ["import top", "from top import x", "def f():\n    import top",
                                  "if True:\n    import os, top as other", "from . import top", "from .top import x"])
def test_circles_between_files_are_found(tmp_path, back):
    grow(tmp_path, top="import middle", middle="from bottom import y", bottom="import os")
    assert circles(tmp_path) == []
    assert "top.py" in circles(grow(tmp_path, bottom=back))[0]


def test_circles_between_folders_are_found(tmp_path):
    """No file leads back to itself here."""
    grow(tmp_path, support__one="from other import two", other__two="", other__three="import os")
    assert circles(tmp_path) == []
    found = circles(grow(tmp_path, other__three="import engine.four", support__four=""))
    assert len(found) == 1 and "support" in found[0] and "other" in found[0]


@pytest.mark.parametrize("name, text", [("support__video", "import grpo"), ("support__video", "from grpo import loss"),
                                        ("support__video", "def f():\n    from lab import plan"),
                                        ("train", "from lab import plan"), ("train", "import lab.plan")])
def test_upward_imports_are_found(tmp_path, name, text):
    grow(tmp_path, grpo="import engine.cache", support__cache="import engine.video", support__video="import numpy",
         tools__plan="import grpo", train="from engine import cache", tests__test_x="fromlabimportplan")
    assert upward(tmp_path) == []
    assert len(upward(grow(tmp_path, **{name: text}))) == 1


TABLE = """# x
`nothing.here` is no row of it
## Equation, function, test
| in the paper | function | test |
| Eq. 3 | `grpo.loss`, `attention.Packed.keep` | `test_loss`, test_rewards.py |
## Next
"""
MAP = """# x
## The tree
    grpo.py       mathematics
    support/
      attention.py  engine
## Next
"""


def test_names_that_do_not_exist_are_found(tmp_path):
    grow(tmp_path, docs__method=TABLE, grpo="def loss(): pass", tests__test_grpo="def test_loss(): pass",
         support__attention="class Packed:\n    def keep(self): pass", test_rewards="")
    assert missing_names(tmp_path) == []
    assert missing_names(grow(tmp_path, grpo="def gain(): pass")) == ["the table names grpo.loss"]
    assert missing_names(grow(tmp_path, tests__test_grpo="def test_gain(): pass"))[1] == "the table names test_loss"
    assert missing_names(grow(tmp_path, support__attention="class Packed: pass"))[1] == \
        "the table names attention.Packed.keep"
    assert missing_names(grow(tmp_path, docs__method="# x")) == ["there is no table"]


def test_files_that_the_map_lacks_are_found(tmp_path):
    grow(tmp_path, README=MAP, grpo="", support__attention="")
    assert wrong_map(tmp_path) == []
    assert wrong_map(grow(tmp_path, support__video="")) == ["the tree lacks engine/video.py"]
    assert wrong_map(grow(tmp_path, README=MAP + "see engine/video.py and gone.py")) == \
        ["the tree lacks engine/video.py", "README.md names gone.py"]


def test_lines_of_code_are_counted(tmp_path):
    text = '"""A file."""\nimport os\n\n\n@cache\ndef f(a,\n      b):\n    """Two\n    lines."""\n    # why\n\n' \
           '    return """not a\n    docstring"""    # 5 lines\n\n\nX = [1,\n     2]\n\n\ndef other():\n    pass\n'
    grow(tmp_path, one=text)
    assert lines_of_code(tmp_path / "one.py", ["f"]) == 5
    assert lines_of_code(tmp_path / "one.py", ["f", "X"]) == 7


def test_a_method_that_grows_or_moves_is_found(tmp_path):
    bodies = {name[:-3]: "\n".join(f"def {each}():\n    pass" for each in names) for name, names in METHOD.items()}
    grow(tmp_path, **bodies)
    assert too_long_method(tmp_path) == []
    long = bodies["grpo"] + "\n    x = 1" * 300
    assert "lines of code" in too_long_method(grow(tmp_path, grpo=long))[0]
    assert too_long_method(grow(tmp_path, grpo=bodies["grpo"].replace("advantages", "gone"))) == \
        ["grpo.py has no advantages"]
