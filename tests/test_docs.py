"""The texts are true: their commands are parsed by the real parsers, their links and names lead somewhere, and what
they print to be edited works as printed."""
import argparse
import ast
import json
import re
import runpy
import shlex
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from test_house import ROOT, code, defined, files, parse, section
from transformers import HfArgumentParser

import rewards
import tasks
import train
from engine import launch
from lab import plan

TEXTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
WORDS = 1500    # the most that README.md has
BEGIN = r"(?:python|torchrun|pip|ruff) "
OTHERS = [      # what is no script of this project, in full
    "python -m venv .venv", "ruff check .", "pip install tensorboard", "pip install -r requirements.txt",
    "pip install -r requirements-peers.txt", "pip install torch"]


class Parsed(Exception):
    """Ends a script whose flags were read."""


def commands(text: str) -> list[str]:
    """Every command of a text: lines of its indented and fenced blocks, continued ones joined, and in `code`."""
    joined, found = re.sub(r" *\\\n\s*", " ", text), []
    blocks = re.findall(r"^(?:    |```).*", joined, re.MULTILINE)
    for line in [block.strip() for block in blocks] + re.findall(r"`([^`\n]+)`", joined):
        parts = re.split(r" && |(?:\s{2,}|^)#.*", line)
        found += [part.strip() for part in parts if part and re.match(BEGIN, part.strip())]
    return found


ALL = [(name, command) for name in TEXTS for command in commands((ROOT / name).read_text(encoding="utf-8"))]


def read(words: list[str], monkeypatch):
    """What a script of the project makes of its flags: a Config, or nothing where argparse reads them. Raises
    SystemExit for a wrong flag. Where a text leaves flags out, "...", those that are needed are put in."""
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")):]]
    module = words[1] == "-m"
    name = words[2].replace(".", "/") + ".py" if module else words[1]
    rest, seen = words[3 if module else 2:], []
    arguments = [word for before, word in zip(["", *rest], rest) if word != "..." or before.startswith("--")]

    def command_line(kind, main, doc):
        needed = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING and "..." in words]
        more = [part for flag in needed if f"--{flag}" not in sys.argv for part in (f"--{flag}", "x")]
        config, unknown = HfArgumentParser(kind, allow_abbrev=False).parse_args_into_dataclasses(
            sys.argv[1:] + more, return_remaining_strings=True)
        assert not unknown
        seen.append(config)
        raise Parsed

    real = argparse.ArgumentParser.parse_args

    def parse_args(self, *given, **options):
        real(self, *given, **options)
        raise Parsed

    monkeypatch.setattr(launch, "command_line", command_line)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    if name == "tasks.py" and not arguments:
        return None         # prints its sample: test_tasks.py
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    return seen[0] if seen else None


def test_commands_are_found():
    text = "a `python x.py --y` b\n\n    python a.py \\\n        --b 1     # why\n    pip install c && python d.py" \
           "\n\n```bash\ntorchrun e.py\n```\n"
    assert commands(text) == ["python a.py --b 1", "pip install c", "python d.py", "python x.py --y"]
    assert len(ALL) > 40 and len({name for name, _ in ALL}) >= 6


@pytest.mark.parametrize("name, command", ALL)
def test_commands_are_parsed(name, command, monkeypatch, tmp_path):
    """By the script's own parser; a training run on real data is planned, too, and what plans is run."""
    if command in OTHERS:
        for file in re.findall(r"-r (\S+)", command):
            assert (ROOT / file).exists()
        return
    words = shlex.split(command)
    if words[1:3] == ["-m", "pytest"]:
        markers = set(re.findall(r'"(\w+): ', (ROOT / "pyproject.toml").read_text()))
        assert "-m" not in words[3:] or words[words.index("-m", 3) + 1] in markers
        return
    config = read(words, monkeypatch)
    if isinstance(config, train.Config) and config.model.startswith("Qwen/"):
        gpus = re.search(r"--nproc_per_node=(\d+)", command)
        shared = {f.name for f in fields(plan.Config)} & {f.name for f in fields(train.Config)} - {"model"}
        config = plan.Config(config.model, int(gpus[1]) if gpus else 1, **{key: getattr(config, key) for key in shared})
    if isinstance(config, plan.Config) and config.model in plan.PUBLISHED:
        planned = plan.report(config)
        assert "hours an epoch" in planned and "DOES NOT FIT" not in planned


def test_swapped_verbs_earn_vc_in_full(capsys):
    """The command that docs/method.md shows for it, run."""
    command, = (command for _, command in ALL if command.startswith("python tasks.py VC"))
    assert tasks.main(shlex.split(command)[2:]) == 0
    assert json.loads(capsys.readouterr().out) == {"format": 1.0, "vc": 1.0, "total": 2.0}


@pytest.mark.parametrize("wrong", ["python train.py --modle x", "python tasks.py AR",
                                   "python evaluate.py ... --stpes 3", "python -m lab.plan --model x --gpu 3"])
def test_wrong_commands_are_found(wrong, monkeypatch):
    with pytest.raises((SystemExit, AssertionError, ValueError)):
        read(shlex.split(wrong), monkeypatch)


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / name).read_text(encoding="utf-8")):
        assert link.startswith("https://") or (ROOT / name).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("name", TEXTS)
def test_names_exist(name):
    """`module.function`, `test_...`, and files."""
    text, there = (ROOT / name).read_text(encoding="utf-8"), {}
    for path in code(ROOT):
        there.setdefault(Path(path).stem, set()).update(defined(parse(ROOT, path)))
    tests = {each for path in files(ROOT) if re.fullmatch(r"(tests/)?test_\w+\.py", path)
             for each in defined(parse(ROOT, path))}
    for module, member in re.findall(r"`(\w+)\.(\w+(?:\.\w+)?)`", text):
        assert module not in there or member in there[module] | {"py", "json", "jsonl"}, f"{module}.{member}"
    for test in re.findall(r"`(test_\w+)`", text):
        assert test in tests, test
    for file in re.findall(r"[\w/]+\.py\b", text):
        assert any(f"/{path}".endswith(f"/{file}") for path in files(ROOT)), file


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= WORDS


def test_the_sample_is_what_tasks_prints(capsys):
    """README.md's completions and rewards, in their order, are those of `python tasks.py`."""
    tasks.main([])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("<think>", "{"))]
    block = section(ROOT, "README.md", "On a laptop")
    assert [line.strip() for line in block.splitlines() if line.strip().startswith(("<think>", "{"))] == printed
    for line in re.findall(r"^    (?:TVG|VC|AR|VD) +(.*?) Reply as", block, re.MULTILINE):
        assert any(task.prompt(tasks.EXAMPLE).startswith(line) for task in tasks.TASKS.values())


def test_where_to_edit_as_printed(monkeypatch, capsys):
    """The new task of README.md, its lines put where it says, is asked, rewarded and listed."""
    block, = re.findall(r"```python\n(.*?)```", section(ROOT, "README.md", "Where to edit"), re.DOTALL)
    lines = [line[2:] for line in block.splitlines()]
    function, task = "\n".join(lines).split("\n\n")
    exec(function, vars(rewards))
    try:
        made, = eval(f"({task})", vars(tasks))
        monkeypatch.setitem(tasks.TASKS, made.name, made)
        assert tasks.main([made.name, "a person closes the door", "<think>a</think> <answer>door</answer>"]) == 0
        assert json.loads(capsys.readouterr().out) == {"format": 1.0, "obj": 1.0, "total": 2.0}
        assert made.inversion and made.sees_segment and not made.needs_verb
    finally:
        del rewards.obj
    for expression in re.findall(r"`reward=(.*?)`", section(ROOT, "README.md", "Where to edit")):
        reward, = eval(expression, vars(tasks))(["<think>a</think> <answer>shut</answer>"], [tasks.EXAMPLE])
        assert 0 < reward.parts["ar"] < 1
    ast.parse(function)
