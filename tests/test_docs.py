"""The texts are true: their commands are parsed by the real parsers, their links and names lead somewhere, the loop in
README.md is that of train.py, and what they print to be edited works as printed."""
import argparse
import ast
import json
import re
import runpy
import shlex
import sys
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import rewards
import tasks
from engine import flags
from lab import plan

ROOT = Path(__file__).parent.parent
TEXTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def read(name: str, title: str = "") -> str:
    """A text, or its section of that title."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if not title:
        return text
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def python_block(text: str) -> str:
    """The first block of python in a text, without what it is indented by."""
    block = re.search(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return textwrap.dedent(block[1])


def commands(text: str) -> list[str]:
    """Every command of a text that runs python: in indented and fenced lines, continued ones joined, and in `code`."""
    joined = re.sub(r" *\\\n\s*", " ", text)
    lines = re.findall(r"^(?:    |```).*", joined, re.MULTILINE) + re.findall(r"`([^`\n]+)`", joined)
    command = r"(?:^ *|&& )((?:python|torchrun) \S.*?)(?=  +#| &&|$)"
    return [found for line in lines for found in re.findall(command, line)]


ALL = [(name, command) for name in TEXTS for command in commands(read(name))]


class Parsed(Exception):
    """Ends a script when its flags are read."""


def parse(words: list[str], monkeypatch):
    """The Config that a script of the project makes of a command, or None where argparse reads it. Raises SystemExit or
    ValueError for a wrong command. "..." stands for the flags that a script needs."""
    if words[0] == "torchrun":
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        words = ["python", *words[script:]]
    if words[1] == "-m":
        words = ["python", words[2].replace(".", "/") + ".py", *words[3:]]
    _, script, *arguments = words
    configs = []

    def command_line(config_class, main, doc):
        required = []
        if "..." in words:
            for field in fields(config_class):
                if field.default is MISSING and field.default_factory is MISSING:
                    required += [f"--{field.name}", "x"]        # the value that follows, if one is given, counts
        configs.append(flags.parse(config_class, required + sys.argv[1:]))
        raise Parsed

    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, *given):
        parse_args(self, *given)
        raise Parsed

    monkeypatch.setattr(flags, "command_line", command_line)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script, *(word for word in arguments if word != "...")])
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return configs[0] if configs else None


def test_commands_are_found():
    text = "a `python x.py --y` b\n\n    python a.py \\\n        --b 1     # why\n    pip install c && python d.py" \
           "\n\n```bash\ntorchrun e.py\n```\n"
    assert commands(text) == ["python a.py --b 1", "python d.py", "python x.py --y"]
    assert len(ALL) > 40 and len({name for name, _ in ALL}) >= 6


@pytest.mark.parametrize("name, command", ALL)
def test_commands_are_parsed(name, command, monkeypatch):
    """By the script's own parser. The cost of a training run on real data is estimated, too: it fits."""
    words = shlex.split(command)
    if words[1:3] == ["-m", "pytest"]:
        assert "-m" not in words[3:] or f'"{words[-1]}: ' in read("pyproject.toml")
        return
    if command in ("python -m venv .venv", "python tasks.py"):      # the latter: test_the_sample_is_what_tasks_prints
        return
    config = parse(words, monkeypatch)
    if not {"train.py", "lab.plan"} & set(words) or config.model not in plan.PUBLISHED:
        return
    if "train.py" in words:
        shared = {field.name for field in fields(plan.Config)} & vars(config).keys()
        gpus = re.search(r"(?<=--nproc_per_node=)\d+|$", command)[0]
        config = plan.Config(gpus=int(gpus or 1), **{name: vars(config)[name] for name in shared})
    assert "\nfits into" in plan.report(config)


@pytest.mark.parametrize("wrong", ["python train.py --modle x", "python tasks.py AR",
                                   "python evaluate.py ... --stpes 3", "python -m lab.plan --model x --gpu 3"])
def test_wrong_commands_are_found(wrong, monkeypatch):
    with pytest.raises((SystemExit, ValueError)):
        parse(shlex.split(wrong), monkeypatch)


def test_swapped_verbs_earn_vc_in_full(capsys):
    """The command that docs/method.md shows for it, run."""
    command, = (command for _, command in ALL if command.startswith("python tasks.py VC"))
    assert tasks.main(shlex.split(command)[2:]) == 0
    assert json.loads(capsys.readouterr().out) == {"format": 1.0, "vc": 1.0, "total": 2.0}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", read(name)):
        assert link.startswith("https://") or (ROOT / name).parent.joinpath(link).exists(), link
    for file in re.findall(r"pip install -r (\S+)", read(name)):
        assert (ROOT / file).exists(), file


def definitions(path: Path) -> set[str]:
    """The names of a file's functions and classes, and of the methods in it."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(module) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


FILES = [path for folder in (".", "engine", "lab", "tests") for path in sorted(ROOT.glob(f"{folder}/*.py"))]
NAMES = {path.stem: definitions(path) for path in FILES}
TESTS = {name for names in NAMES.values() for name in names if name.startswith("test_")}


@pytest.mark.parametrize("name", TEXTS)
def test_names_exist(name):
    """`module.function`, `test_...`, and files."""
    text = read(name)
    for module, *members in re.findall(r"`(\w+)\.(\w+)(?:\.(\w+))?`", text):
        assert module not in NAMES or set(members) <= NAMES[module] | {"", "py", "json", "jsonl"}, (module, members)
    assert set(re.findall(r"`(test_\w+)`", text)) <= TESTS
    for file in re.findall(r"[\w/]+\.py\b", text):
        assert any(f"/{path.relative_to(ROOT)}".endswith(f"/{file}") for path in FILES), file


def test_the_functions_of_the_equations_are_of_this_project():
    table = read("docs/method.md", "Equation, function, test").partition("\n\nEq. 12")[0]
    modules = re.findall(r"`(\w+)\.", table)
    assert len(modules) > 10 and set(modules) <= NAMES.keys()


def test_the_tree_names_every_file():
    entries, folder = [], ""
    for indent, name in re.findall(r"^    ( *)(\S+)", read("README.md", "The tree"), re.MULTILINE):
        entries.append(folder + name if indent else name)
        if name.endswith("/"):
            folder = name
    files = [path.relative_to(ROOT).as_posix() for path in FILES if path.parent.name != "tests"]
    assert sorted(entries) == sorted([*files, "docs/", "engine/", "lab/", "results/", "tests/"])


def test_the_loop_is_that_of_train():
    loop = re.search(r"^( +)for step in run\.steps\(.*?\n(?=\1\S)", read("train.py"), re.DOTALL | re.MULTILINE)
    assert python_block(read("README.md")) == textwrap.dedent(loop[0])


def test_the_sample_is_what_tasks_prints(capsys):
    """README.md's prompts, completions and rewards, in their order, are those of `python tasks.py`."""
    tasks.main([])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("<think>", "{"))]
    section = read("README.md", "On a laptop")
    assert re.findall(r"^ +(<think>.*|{.*)", section, re.MULTILINE) == printed
    prompts = [task.prompt(tasks.EXAMPLE).partition(" Reply as")[0] for task in tasks.TASKS.values()]
    assert re.findall(r"^    (?:TVG|VC|AR|VD) +(.*) Reply as", section, re.MULTILINE) == prompts


def test_where_to_edit_as_printed(monkeypatch, capsys):
    """The new task of README.md, its lines put where it says, is asked, rewarded and listed."""
    section = read("README.md", "Where to edit")
    function, task = python_block(section).split("\n\n")
    monkeypatch.setattr(rewards, "obj", None, raising=False)        # taken out again at the end
    exec(function, vars(rewards))
    made, = eval(f"({task})", vars(tasks))
    monkeypatch.setitem(tasks.TASKS, made.name, made)
    assert tasks.main([made.name, "a person closes the door.", "<think>a</think> <answer>door</answer>"]) == 0
    assert json.loads(capsys.readouterr().out) == {"format": 1.0, "obj": 1.0, "total": 2.0}
    in_form = tasks.in_form(made, think=False, cosine=True)
    reward, = in_form.reward(["<answer>window</answer>"], [tasks.EXAMPLE])
    assert reward.parts == {"format": 1.0, "obj": 0.0}
    expression, = re.findall(r"`reward=(.*?)`", section)
    reward, = eval(expression, vars(tasks))(["<think>a</think> <answer>shut</answer>"], [tasks.EXAMPLE])
    assert 0 < reward.parts["ar"] < 1


def test_messages_are_those_of_the_code():
    """Each `message` of docs/trouble.md, but for what varies in it, stands in a string of the code."""
    code = ""
    for path in FILES:
        if not path.name.startswith("test_"):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            code += "\n".join(str(node.value) for node in nodes if isinstance(node, ast.Constant))
    first_column = re.findall(r"^\| (.*?) \|", read("docs/trouble.md"), re.MULTILINE)
    for message in re.findall(r"`([^`]* [^`]*)`", "\n".join(first_column)):
        for piece in re.split(r"'[^']*'|\S*[.\d]\S*|--\w+ \w+", message):
            assert piece.strip() in code, message
