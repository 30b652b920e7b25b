"""Flags, one-line errors, whole files."""
import sys
from dataclasses import dataclass, field

import pytest

import launch


@dataclass
class Config:
    name: str
    count: int = field(default=3, metadata={"help": "how many"})


def run(monkeypatch, main, *flags):
    monkeypatch.setattr(sys, "argv", ["x.py", *flags])
    launch.command_line(Config, main, "What x.py does.\n\nMore.")


def test_flags_become_a_config(monkeypatch):
    seen = []
    run(monkeypatch, seen.append, "--name", "a", "--count", "5")
    assert seen == [Config("a", 5)]


@pytest.mark.parametrize("error", [ValueError("a.txt: is\nempty"), OSError(28, "No space left on device", "a.txt")])
def test_an_error_a_person_can_mend_is_one_line(monkeypatch, capsys, error):
    def main(config):
        raise error

    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, main, "--name", "a")
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("x.py: ") and "a.txt" in lines[0]


def test_a_bug_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, lambda config: 1 / 0, "--name", "a")


@pytest.mark.parametrize("flags", [["--name", "a", "--cuont", "5"], ["--count", "5"], ["--name", "a", "--count", "x"]])
def test_wrong_flags_end_before_anything_runs(monkeypatch, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, lambda config: pytest.fail("ran"), *flags)
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_files_are_written_whole(tmp_path):
    launch.write_whole(tmp_path / "new" / "a.txt", "one")
    launch.write_whole(tmp_path / "new" / "a.txt", "two")
    assert (tmp_path / "new" / "a.txt").read_text() == "two" and len(list((tmp_path / "new").iterdir())) == 1
    launch.write_config(Config("a"), tmp_path)
    assert '"count": 3' in (tmp_path / "config.json").read_text()


def test_one_process_gathers_itself():
    assert launch.gather([1, 2]) == [1, 2]
