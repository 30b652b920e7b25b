"""Every wrong input of every script ends with one line that names the culprit, and exit code 2, before anything is
loaded; and nothing that is read can run code."""
import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import data
import evaluate
import ground
import model
import sft
import tasks
import toy
import train
from engine import flags, plot

HERE = Path(__file__).parent.parent
GONE = object()     # as a value: without this flag


@pytest.fixture(scope="module")
def wrong(folder, tmp_path_factory):
    """A folder of wrong inputs of all kinds, and two right ones: ok.txt with its video in videos/."""
    good, folder = folder / "model", tmp_path_factory.mktemp("wrong")
    (folder / "good").symlink_to(good)
    for name, content in {
            "ok.txt": "a 0 1##a person sits.\n", "silent.txt": "a 0 1##the table over there\n", "empty.txt": "",
            "prose.txt": "hello\n", "gone.txt": "b 0 1##a person sits.\n", "out.txt": "../a 0 1##a person sits.\n",
            "bytes": b"\xff\xfe\0", "videos/a.mp4": "no video", "none/notes.txt": "",
            "config/config.json": '{"model_type": "qwen2_vl"}', "torn/config.json": '{"model_type"',
            "log.jsonl": "[1]\n{}\n",
            "used/config.json": "[1]", "unknown.jsonl": '{"id": "b:1", "task": "VD", "completion": "x"}\n',
            "number.jsonl": '{"id": "a:1", "task": "VD", "completion": 3}\n',
            "deep.jsonl": "[" * 100_000 + "\n"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def run(monkeypatch, script, words):
    """Run a script as its command line does, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__.split('.')[-1]}.py", *words])
    if hasattr(script, "Config"):
        if script is ground:
            sys.argv[1:] = ground.flags(sys.argv[1:])
        flags.command_line(script.Config, script.main, script.__doc__)
    else:
        sys.exit(script.main(words))


RIGHT = {   # flags with which a script gets as far as to load a model
    "train": {"model": "good", "annotations": "ok.txt", "videos": "videos", "output": "new"},
    "sft": {"model": "good", "annotations": "ok.txt", "videos": "videos", "output": "new"},
    "evaluate": {"model": "good", "annotations": "ok.txt", "videos": "videos", "output": "new"},
    "ground": {"video": "absent.mp4", "queries": "a person sits", "model": "good"},
    "toy": {"output": "videos"}}
NUMBERS = {     # of each script: those that must be above 0, and those that may be 0
    "train": ("steps max_tokens temperature learning_rate max_grad_norm total_pixels cache_gb video_timeout workers "
              "keep max_bad_steps updates clip eval_samples",
              "seed beta warmup_steps micro_batch_size save_every tvg_prob vd_max_verbs eval_every lora_rank"),
    "sft": ("steps learning_rate max_grad_norm total_pixels cache_gb video_timeout workers keep max_bad_steps",
            "seed micro_batch_size save_every lora_rank"),
    "evaluate": ("max_tokens total_pixels cache_gb video_timeout workers", "seed steps temperature batch_size"),
    "ground": ("batch_size max_tokens total_pixels video_timeout", ""),
    "toy": ("learning_rate prompts_per_step warm_steps", "seed beta steps tvg_prob eval_every lora_rank")}
SCRIPTS = {module.__name__: module for module in (train, sft, evaluate, ground, toy)}


def numbers():
    """(script, flag, value): too small, not finite, not a number."""
    for script, (positive, others) in NUMBERS.items():
        for name in (*positive.split(), *others.split()):
            whole = SCRIPTS[script].Config.__annotations__[name] is int
            zero, odd = ("0",) * (name in positive.split()), ("1.5", "1" + "0" * 30) if whole else ("nan", "inf")
            for value in (*zero, "-1", "x", *odd):
                yield script, name, value
        for name in ("tvg_prob",) * ("tvg_prob" in others):
            yield script, name, "1.01"


@pytest.mark.parametrize("script", NUMBERS)
def test_every_number_is_in_the_table(script):
    fields = SCRIPTS[script].Config.__annotations__
    known = {"group_size", "prompts_per_step"} if script == "train" else {"batch_size"} if script == "sft" else set()
    numbers = {name for name, kind in fields.items() if kind in (int, float)}
    assert numbers - known == set(" ".join(NUMBERS[script]).split())


@pytest.mark.parametrize("script, name, value", list(numbers()))
def test_numbers(monkeypatch, capsys, wrong, script, name, value):
    flags = {**RIGHT[script], name: value}
    ends(monkeypatch, capsys, wrong, script, flags, f"--{name}")


@pytest.mark.parametrize("script", ["train", "sft", "evaluate"])
@pytest.mark.parametrize("flags, words", [
    ({"model": "absent"}, "absent.*--model"), ({"model": "config"}, "config.*qwen2_vl"),
    ({"model": "torn"}, "torn.*--model"),
    ({"model": "ok.txt"}, "ok.txt.*--model"), ({"annotations": "absent.txt"}, "absent.txt.*--annotations"),
    ({"annotations": "videos"}, "videos.*--annotations"), ({"annotations": "empty.txt"}, "empty.txt.*--annotations"),
    ({"annotations": "prose.txt"}, "prose.txt.*--annotations"), ({"annotations": "bytes"}, "bytes.*--annotations"),
    ({"annotations": "/proc/self/mem"}, "/proc/self/mem.*--annotations"),
    ({"annotations": "out.txt"}, "out.txt:1.*leaves the folder.*--allow_outside"),
    ({"videos": "absent"}, "absent.*--videos"),
    ({"videos": "none"}, "none: no video files.*--videos"), ({"videos": "ok.txt"}, "ok.txt.*--videos"),
    ({"annotations": "gone.txt"}, "videos: has none of the videos of gone.txt.*b.mp4.*--videos"),
    ({"output": "ok.txt"}, "--output ok.txt"), ({"output": "ok.txt/deeper/still"}, "--output ok.txt/deeper/still"),
    ({"output": "/proc/new"}, "--output /proc/new"), ({"output": "x" * 300}, "--output xxx"),
    ({"outptu": "new"}, "unknown.*--outptu"), ({"step": "3"}, "unknown.*--step"), ({"output": GONE}, "output"),
    ({"model": GONE}, "--model"), ({"annotations": GONE}, "--annotations"), ({"videos": GONE}, "--videos")])
def test_paths_and_flags(monkeypatch, capsys, wrong, script, flags, words):
    ends(monkeypatch, capsys, wrong, script, {**RIGHT[script], **flags}, words)


@pytest.mark.parametrize("script, flags, words", [
    ("train", {"tasks": "XX"}, "--tasks XX.*VC AR VD"), ("train", {"tasks": "TVG"}, "--tasks TVG"),
    ("train", {"group_size": "1"}, "--group_size 1"), ("train", {"group_size": "-3"}, "--group_size -3"),
    ("train", {"prompts_per_step": "0"}, "--prompts_per_step 0"),
    ("train", {"prompts_per_step": "-4"}, "--prompts_per_step -4"),
    ("train", {"annotations": "silent.txt"}, "silent.txt.*--tvg_prob 1"),
    ("sft", {"batch_size": "0"}, "--batch_size 0"),
    ("sft", {"annotations": "silent.txt"}, "silent.txt: nothing to learn"),
    ("sft", {"demonstrations": "absent.jsonl"}, "absent.jsonl"), ("sft", {"demonstrations": "videos"}, "videos"),
    ("sft", {"demonstrations": "empty.txt"}, "empty.txt:1: no demonstration"),
    ("sft", {"demonstrations": "bytes"}, "bytes:1: no demonstration"),
    ("sft", {"demonstrations": "unknown.jsonl"}, "unknown.jsonl:1: no demonstration.*b:1"),
    ("sft", {"demonstrations": "number.jsonl"}, "number.jsonl:1: no demonstration"),
    ("sft", {"demonstrations": "deep.jsonl"}, "deep.jsonl:1: no demonstration"),
    ("evaluate", {"tasks": "XX"}, "--tasks XX"), ("evaluate", {"output": "used"}, "used.config.json"),
    ("evaluate", {"blind": "perhaps"}, "--blind"),
    ("evaluate", {"model": GONE, "predictions": "absent.jsonl"}, "absent.jsonl"),
    ("evaluate", {"model": GONE, "predictions": "videos"}, "videos"),
    ("evaluate", {"model": GONE, "predictions": "bytes"}, "bytes: cannot be read .it is UTF-16"),
    ("evaluate", {"model": GONE, "predictions": "deep.jsonl"}, "deep.jsonl:1: no prediction"),
    ("evaluate", {"model": GONE, "predictions": "log.jsonl"}, "log.jsonl:1: no prediction"),
    ("evaluate", {"model": GONE, "predictions": "ok.txt"}, "ok.txt:1: no prediction"),
    ("ground", {}, "absent.mp4: no such video file"), ("ground", {"video": "videos"}, "videos: is not a regular file"),
    ("ground", {"queries": " "}, "query 1 of 1 is empty"), ("ground", {"queries": GONE}, "--queries"),
    ("ground", {"png": "ok.txt/a.png"}, "--png ok.txt"), ("ground", {"png": "videos"}, "--png videos: is a folder"),
    ("ground", {"modle": "x"}, "unknown.*--modle"),
    ("toy", {"output": "ok.txt"}, "--output ok.txt"),
    ("toy", {"output": "new", "warm_start": "absent"}, "absent: not a model folder"),
    ("toy", {"output": "new", "warm_start": "videos"}, "videos: not a model folder"),
    ("toy", {"stesp": "5"}, "unknown.*--stesp")])
def test_what_only_one_script_reads(monkeypatch, capsys, wrong, script, flags, words):
    ends(monkeypatch, capsys, wrong, script, {**RIGHT[script], **flags}, words)


def ends(monkeypatch, capsys, wrong, script, flags, words):
    """The script ends with code 2 and one line of its own (or argparse's, which has usage before it) that matches
    `words`, has loaded no model and has left nothing behind."""
    monkeypatch.chdir(wrong)
    load = lambda *_, **__: pytest.fail("loads a model")
    monkeypatch.setattr(model.Qwen2_5_VLForConditionalGeneration, "from_pretrained", load)
    before = sorted(wrong.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, SCRIPTS[script], [word for name, value in flags.items() if value is not GONE
                                           for word in (f"--{name}", value)])
    one_line(capsys, stop, f"{script}.py: ", words)
    assert sorted(wrong.rglob("*")) == before


def one_line(capsys, stop, start, words):
    said = capsys.readouterr()
    *usage, line = said.err.splitlines()
    assert stop.value.code == 2 and not said.out and line.startswith(start)
    assert len(usage) <= 2 and all(word.startswith(("usage: ", "   ")) for word in usage), said.err
    with pytest.raises(ValueError, match=words):
        raise ValueError(line)


@pytest.mark.parametrize("script, words, expected", [
    (data, ["absent.txt"], "absent.txt"), (data, ["videos"], "videos"), (data, ["empty.txt"], "empty.txt"),
    (data, ["ok.txt", "--videos", "absent"], "absent.*--videos"),
    (data, ["ok.txt", "--videos", "none"], "none: no video files"),
    (data, ["gone.txt", "--videos", "videos"], "has none of the videos"),
    (data, ["out.txt", "--videos", "videos"], "leaves"),
    (data, ["ok.txt", "--workers", "0"], "--workers 0"), (data, ["ok.txt", "--vidoes", "videos"], "--vidoes"),
    (data, [], "file"), (tasks, ["XX", "q", "c"], "'XX'"), (tasks, ["TVG", "q", "c"], "--segment START END"),
    (tasks, ["TVG", "q", "c", "--segment", "5", "3"], "--segment 5 3"), (tasks, ["AR", "q"], "completion"),
    (tasks, ["TVG", "q", "c", "--segment", "nan", "3"], "--segment nan 3"),
    (tasks, ["TVG", "q", "c", "--segment", "1", "inf"], "--segment 1 inf"),
    (tasks, ["TVG", "q", "c", "--segment", "-1", "3"], "--segment"), (plot, ["absent"], "absent"), (plot, [], "runs"),
    (plot, ["none"], "none/metrics.jsonl"), (plot, ["empty.txt"], "empty.txt: holds no steps"),
    (plot, ["bytes"], "bytes"),
    (plot, ["log.jsonl"], "log.jsonl: line 1"), (plot, ["log.jsonl", "--output", "videos"], "--output videos"),
    (plot, ["log.jsonl", "--outptu", "x"], "--outptu")])
def test_scripts_without_a_config(monkeypatch, capsys, wrong, script, words, expected):
    monkeypatch.chdir(wrong)
    before = sorted(wrong.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, script, words)
    one_line(capsys, stop, f"{script.__name__.split('.')[-1]}.py: ", expected)
    assert sorted(wrong.rglob("*")) == before


def test_a_picture_that_cannot_be_written(monkeypatch, capsys, wrong, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "task": "TVG", "reward": 1.0}\n')
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, plot, [str(tmp_path), "--output", str(wrong / "ok.txt" / "a.png")])
    one_line(capsys, stop, "plot.py: ", "ok.txt")


def test_in_time(wrong):
    """As a command: 4 s, nearly all of them to import torch and transformers. Of processor time, since a machine may
    be busy."""
    words = ["--model", "absent", "--annotations", "ok.txt", "--videos", "videos", "--output", "new", "--beta", "nan"]
    began = os.times()
    done = subprocess.run([sys.executable, str(HERE / "train.py"), *words], cwd=wrong, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("train.py: --beta nan") and done.stderr.count("\n") == 1
    assert os.times().children_user - began.children_user < 10


def sources():
    return [path for room in (".", "support", "tools") for path in HERE.glob(f"{room}/*.py")
            if not path.name.startswith("test_")]


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_nothing_that_is_read_can_run_code(path):
    """No eval, no pickle; tensors only from safetensors, or with weights_only=True."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not {name.split(".")[0] for name in names} & {
                "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
        if isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), ast.unparse(node)
            assert name != "torch.load" or given.get("weights_only") == "True", ast.unparse(node)
            for danger in ("allow_pickle", "trust_remote_code", "shell"):
                assert given.get(danger, "False") == "False", ast.unparse(node)
            assert not name.endswith("Generation.from_pretrained") or given.get("use_safetensors") == "True"


def test_paths_that_leave_the_folder(tmp_path):
    for name in ("videos/a.mp4", "videos/sub/b.mp4", "outside.mp4", "elsewhere/a.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "videos" / "linked.mp4").symlink_to(tmp_path / "outside.mp4")
    row = {"sentence": "a person sits", "timestamp": [0, 1], "duration": 5}
    paths = ["./x/a.mp4", "linked.mp4", "../outside.mp4", f"{tmp_path}/elsewhere/a.mp4", "/elsewhere/b.mp4",
             "sub/../a.mp4", "..", "/"]
    (tmp_path / "list.json").write_text(json.dumps([{**row, "video": path} for path in paths]))
    videos = str(tmp_path / "videos")
    samples, rejected = data.read(str(tmp_path / "list.json"), videos)
    assert [sample.video for sample in samples] == [f"{videos}/a.mp4", f"{videos}/linked.mp4"]
    assert [r.reason for r in rejected] == ["its path leaves the folder of the videos"] * 5 + ["malformed"]
    assert "--allow_outside" in str(rejected[0]) and "../outside.mp4" in str(rejected[0]) and "[2]" in rejected[0].place
    samples, rejected = data.read(str(tmp_path / "list.json"), videos, allow_outside=True)
    assert [sample.video for sample in samples[:6]] == [
        f"{videos}/a.mp4", f"{videos}/linked.mp4", f"{videos}/../outside.mp4", f"{tmp_path}/elsewhere/a.mp4",
        f"{videos}/sub/b.mp4", f"{videos}/sub/../a.mp4"]
    assert len(data.read(str(tmp_path / "list.json"), None)[0]) == 7        # without videos none is opened


def test_missing_videos_are_counted(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"x")
    (tmp_path / "list.txt").write_text("b 0 1##x\nb 1 2##x\na 0 1##x\nc 0 1##x\n")
    samples, _ = data.read(str(tmp_path / "list.txt"), str(tmp_path / "videos"))
    assert [Path(path).name for path in data.missing(samples)] == ["b.mp4", "c.mp4"]
