"""From a command line to main(config), and what every script with a Config does with wrong flags: it ends with one line
that names the culprit, and exit code 2, before anything is loaded."""
import importlib
import os
import re
import sys
from dataclasses import MISSING, dataclass, fields

import pytest
from conftest import ROOT

import model
import train
from engine import flags
from engine.flags import AnswerFlags, VideoFlags, flag

SCRIPTS = {path.stem: importlib.import_module(path.stem) for path in sorted(ROOT.glob("*.py"))
           if re.search(r"command_line\(Config,", path.read_text())}
RIGHT = {   # values with which a script gets as far as to load a model; see `wrong`
    "model": "good", "annotations": "ok.txt", "videos": "videos", "output": "new",
    "video": "absent.mp4", "queries": "a person sits"}


@dataclass(kw_only=True)
class Config(VideoFlags, AnswerFlags):
    """an example"""
    name: str = flag(MISSING, "who, 100 % sure")
    count: int = flag(3, "how many")
    words: list[str] = flag(["a", "b"], "in any order")
    dry: bool = flag(False, "do nothing")


def run(monkeypatch, main, *words):
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    flags.command_line(Config, main, "What x.py does.\n\nMore.")


def test_words_become_a_config():
    assert flags.parse(Config, ["--name", "a"]) == Config(name="a")
    words = "--name a --count 5 --words c --dry --cache_gb 0.5 --max_tokens 9".split()
    expected = Config(name="a", count=5, words=["c"], dry=True, cache_gb=0.5, max_tokens=9)
    assert flags.parse(Config, words) == expected
    assert flags.parse(Config, ["--name", "a", "--words", "--dry", "False"]).words == []


def test_the_longest_completion_follows_from_thoughts():
    assert Config(name="a").max_tokens == 1024
    assert Config(name="a", think=False).max_tokens == 64
    assert Config(name="a", think=False, max_tokens=7).max_tokens == 7


def test_help_has_the_required_flags_first_and_the_others_by_class():
    text = flags.make_parser(Config, "What x.py does.\n\nMore.").format_help()
    assert "What x.py does." in text and "More." not in text
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert titles[1] == "required"              # behind argparse's own --help
    assert set(titles[2:]) == {"answers", "videos", "an example"}
    for title, names in (("required", ["name"]), ("answers", ["think", "max_tokens"]),
                         ("an example", ["count", "words", "dry"])):
        group = text.split(f"\n{title}:\n")[1].split("\n\n")[0]
        assert re.findall(r"^  --(\w+)", group, re.MULTILINE) == names
    assert "who, 100 % sure" in text


def test_positional_words_may_stand_before_and_behind_flags():
    @dataclass(kw_only=True)
    class Placed:
        """an example"""
        file: str = flag(MISSING, "first", positional=True)
        others: list[str] = flag(MISSING, "behind it", positional=True)
        count: int = flag(3, "how many")

    for words in ("a b c --count 5", "--count 5 a b c", "a b --count 5 c"):
        assert flags.parse(Placed, words.split()) == Placed(file="a", others=["b", "c"], count=5)
    for words in ("", "a"):
        with pytest.raises(SystemExit):
            flags.parse(Placed, words.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_its_reason(script):
    config = SCRIPTS[script].Config
    assert all(field.metadata["help"] for field in fields(config))
    assert flags.make_parser(config, SCRIPTS[script].__doc__).format_help()


def test_train_has_at_most_36_flags():
    assert len(fields(train.Config)) <= 36


def end(monkeypatch, capsys, error, *words):
    """The exit code and the lines on standard error of a main that raises `error`."""
    def main(config):
        raise error

    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, main, "--name", "a", *words)
    return stop.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("error", [
    ValueError("a.txt: is\nempty"), OSError(28, "No space left", "a.txt"),
    ValueError("a.txt: bad \x1b[31m name")])
def test_an_error_a_person_can_mend_is_one_line(monkeypatch, capsys, error):
    code, lines = end(monkeypatch, capsys, error)
    assert code == 2
    line, = lines
    assert line.startswith("x.py: ") and "a.txt" in line
    assert line.isprintable() and "\\n" not in line
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(type(error)):
        end(monkeypatch, capsys, error)


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("a mistake in the code")])
def test_a_bug_keeps_its_traceback(monkeypatch, capsys, error):
    with pytest.raises(type(error)):
        end(monkeypatch, capsys, error)


def test_a_lost_process_is_one_line(monkeypatch, capsys):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]")
    with pytest.raises(RuntimeError):           # one process alone has lost something else
        end(monkeypatch, capsys, lost)
    monkeypatch.setattr(flags.dist, "is_initialized", lambda: True)
    code, lines = end(monkeypatch, capsys, lost)
    assert code == 1
    assert len(lines) == 1 and "another process of the run ended" in lines[0]


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(os, "_exit", sys.exit)
    code, lines = end(monkeypatch, capsys, KeyboardInterrupt())
    assert code == 130
    assert lines == ["", "x.py: stopped; the same command, with --resume where the script has it, "
                         "goes on"]


def test_a_run_that_is_stopped_ends_well(monkeypatch):
    run(monkeypatch, lambda config: sys.exit(0), "--name", "a")


@pytest.mark.parametrize("words", [
    "--name a --cuont 5", "--name a --coun 5", "--count 5", "--name a --count x",
    "--name a --dry 3"])
def test_wrong_words_end_before_anything_runs(monkeypatch, capsys, words):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, lambda config: pytest.fail("ran"), *words.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("x.py: ")


@dataclass
class Numbers:
    size: int = 1
    rate: float = 0.5
    win_prob: float = 1.0
    name: str = ""
    dry: bool = False


@pytest.mark.parametrize("changes, allowed", [
    ({"size": 0}, None), ({"size": -1}, "from 0 on"), ({"size": 10 ** 13}, "from 0 on"),
    ({"rate": 0}, "above 0"), ({"rate": float("nan")}, "above 0"),
    ({"rate": float("inf")}, "above 0"), ({"win_prob": 0}, None),
    ({"win_prob": 1.01}, "from 0 to 1"), ({"win_prob": -0.1}, "from 0 to 1")])
def test_numbers_are_checked(changes, allowed):
    config = Numbers(**changes)
    if allowed is None:
        flags.check_numbers(config, "rate")
        return
    (name, value), = changes.items()
    with pytest.raises(ValueError, match=f"--{name} {value}: give a number {allowed}$"):
        flags.check_numbers(config, "rate")


# The scripts

@pytest.fixture(scope="module")
def wrong(folder, tmp_path_factory):
    """A folder of wrong inputs of all kinds, and of right ones: a model, and ok.txt with its video in videos/."""
    place = tmp_path_factory.mktemp("wrong")
    (place / "good").symlink_to(folder / "model")
    for name, content in {
            "ok.txt": "a 0 1##a person sits.\n", "gone.txt": "b 0 1##a person sits.\n",
            "silent.txt": "a 0 1##the table over there\n", "empty.txt": "",
            "videos/a.mp4": "no video", "none/notes.txt": "", "torn/config.json": '{"model_type"',
            "unknown.jsonl": '{"id": "b:1", "task": "VD", "completion": "x"}\n'}.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(content)
    return place


@pytest.fixture
def ends(wrong, monkeypatch, capsys):
    """ends(script, words, **values): the script ends with code 2 and one line of its own (or argparse's, which has
    its usage before it) that matches `words`, loads no model and leaves nothing behind."""
    def load(*_, **__):
        pytest.fail("loads a model")

    def check(script, words, **values):
        config, before = SCRIPTS[script].Config, sorted(wrong.rglob("*"))
        right = {field.name: RIGHT[field.name] for field in fields(config) if field.name in RIGHT}
        places = {field.name for field in fields(config) if field.metadata["positional"]}
        line = [f"{script}.py"]
        for name, value in (right | values).items():
            line += [value] if name in places else [f"--{name}", value]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as stop:
            flags.command_line(config, SCRIPTS[script].main, SCRIPTS[script].__doc__)
        out, err = capsys.readouterr()
        *usage, last = err.splitlines()
        assert stop.value.code == 2 and not out, err
        assert all(each.startswith(("usage: ", "   ")) for each in usage), err
        assert last.startswith(f"{script}.py: ") and re.search(words, last), last
        assert sorted(wrong.rglob("*")) == before

    monkeypatch.chdir(wrong)
    monkeypatch.setattr(model.Qwen2_5_VLForConditionalGeneration, "from_pretrained", load)
    return check


def may_be_0(field) -> bool:
    """Whether a number may be 0: by default it is, or it is a probability or a weight, or its help says what 0 does."""
    says_so = re.search(r"(^|[ ;,.])0[:, ]", field.metadata["help"])
    return field.default == 0 or field.name.endswith(("_prob", "beta")) or bool(says_so)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_number_is_named(ends, script):
    for field in fields(SCRIPTS[script].Config):
        if field.type not in (int, float):
            continue
        values = ["-1", "x", "1e999" if field.type is float else "1.5"]
        values += ["1.01"] if field.name.endswith("_prob") else []
        values += [] if may_be_0(field) else ["0"]
        for value in values:
            ends(script, f"--{field.name}", **{field.name: value})


@pytest.mark.parametrize("script", ["train", "sft", "evaluate"])
@pytest.mark.parametrize("flag, value, words", [
    ("model", "absent", "absent.*--model"), ("model", "torn", "torn"),
    ("model", "ok.txt", "ok.txt.*--model"),
    ("annotations", "absent.txt", "absent.txt.*--annotations"),
    ("annotations", "empty.txt", "empty.txt.*--annotations"),
    ("annotations", "gone.txt", "videos: has none of the videos of gone.txt.*b.mp4.*--videos"),
    ("videos", "absent", "absent.*--videos"), ("videos", "none", "none: no video files.*--videos"),
    ("output", "ok.txt", "--output ok.txt"), ("output", "/proc/new", "--output /proc/new"),
    ("outptu", "new", "unknown.*--outptu")])
def test_a_wrong_path_is_named(ends, script, flag, value, words):
    ends(script, words, **{flag: value})


@pytest.mark.parametrize("script, flag, value, words", [
    ("train", "tasks", "XX", "--tasks XX.*VC AR VD"), ("train", "tasks", "TVG", "--tasks TVG"),
    ("train", "group_size", "1", "--group_size 1"),
    ("train", "loss_type", "ppo", "--loss_type ppo.*bnpo"),
    ("train", "scale_rewards", "batch", "--scale_rewards batch.*std, none"),
    ("train", "eval_every", "2", "--eval_every 2.*--eval_annotations"),
    ("train", "eval_annotations", "absent.txt", "absent.txt.*--eval_annotations"),
    ("train", "annotations", "silent.txt", "silent.txt.*--tvg_prob 1"),
    ("sft", "annotations", "silent.txt", "silent.txt: nothing to learn"),
    ("sft", "demonstrations", "absent.jsonl", "absent.jsonl"),
    ("sft", "demonstrations", "unknown.jsonl", "unknown.jsonl:1: no demonstration.*b:1")])
def test_what_one_script_reads_is_named(ends, script, flag, value, words):
    ends(script, words, **{flag: value})
