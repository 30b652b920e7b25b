"""Files that are written whole or not at all, and that nothing which is read can run code."""
import ast
from dataclasses import dataclass

import pytest
from conftest import ROOT, full_disk

from engine import files

SOURCES = [path for folder in (".", "engine", "lab") for path in ROOT.glob(f"{folder}/*.py")
           if not path.name.startswith("test_")]
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}


@dataclass
class Config:
    name: str
    count: int = 3


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    files.write_whole(path, "one")
    files.write_whole(path, "two")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(OSError, match="a.txt/b: could not be written"):
        files.write_whole(path / "b", "")


def test_a_config_comes_back(tmp_path):
    files.write_config(Config("a"), tmp_path)
    before = files.read_config(tmp_path / "config.json")
    assert before == {"name": "a", "count": 3}
    now = {"name": "b", "new": None}
    assert files.changed_flags(now, before) == ["name", "count", "new"]
    assert files.changed_flags(now, before, ignored={"name", "new"}) == ["count"]


@pytest.mark.parametrize("text", ["{", "[1]", "null", "3", '"x"'])
def test_what_is_no_config_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="config.json: is not the config of a run .*; give"):
        files.read_config(path)


def test_rows_are_json_even_if_numbers_are_not_finite(tmp_path):
    path = tmp_path / "log"
    files.append(path, [{"a": float("nan"), "b": 1.0}])
    files.append(path, [{"a": None, "c": [1], "d": -float("inf")}])
    assert path.read_text() == '{"a": null, "b": 1.0}\n{"a": null, "c": [1], "d": null}\n'
    with full_disk(100), pytest.raises(OSError, match="log: could not be written .File too large"):
        files.append(path, [{"a": "x" * 100}])


def test_an_output_that_cannot_be_written_is_named_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    files.check_output(tmp_path / "new" / "deeper")
    for path in (tmp_path / "file", tmp_path / "file/deeper", "/proc/new", tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match=f"--png {path}: cannot be written to .*give another"):
            files.check_output(path, "--png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_that_is_read_can_run_code(path):
    """No eval, no pickle; tensors come from safetensors, or with weights_only=True."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            assert UNSAFE_MODULES.isdisjoint(name.split(".")[0] for name in names)
        if isinstance(node, ast.Call):
            call = ast.unparse(node)
            name = ast.unparse(node.func)
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert name not in UNSAFE_CALLS, call
            assert name != "torch.load" or options.get("weights_only") == "True", call
            for danger in ("allow_pickle", "trust_remote_code", "shell"):
                assert options.get(danger, "False") == "False", call
            if name.endswith("Generation.from_pretrained"):
                assert options.get("use_safetensors") == "True", call
