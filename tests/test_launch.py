"""Flags, one-line errors, signals, whole files."""
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from support import launch


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


def test_rows_are_json_even_if_numbers_are_not_finite(tmp_path):
    launch.append(tmp_path / "log", [{"a": float("nan"), "b": 1.0}])
    launch.append(tmp_path / "log", [{"a": None, "c": [1], "d": -float("inf")}])
    assert (tmp_path / "log").read_text() == '{"a": null, "b": 1.0}\n{"a": null, "c": [1], "d": null}\n'
    with pytest.raises(OSError, match="nowhere/log: could not be written .No such"):
        launch.append(tmp_path / "nowhere" / "log", [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_and_a_later_one_ends(monkeypatch, capfd, number):
    before, now, ended = signal.getsignal(number), [0.0], []
    monkeypatch.setattr(launch.time, "monotonic", lambda: now[0])
    with launch.stop_signals() as stop:
        assert not stop.is_set()
        for now[0] in (10.0, 11.5):             # the same one, from torchrun and from a scheduler
            signal.raise_signal(number)
            assert stop.is_set()
        assert capfd.readouterr().err.count("stopping after this step") == 1
        monkeypatch.setattr(signal, "raise_signal", lambda n: ended.append((n, signal.getsignal(n))))
        now[0] = 13.0
        os.kill(os.getpid(), number)
    assert ended == [(number, signal.SIG_DFL)] and signal.getsignal(number) is before


def test_other_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGTERM)

    def enter():
        with launch.stop_signals() as stop:
            assert signal.getsignal(signal.SIGTERM) is before and not stop.is_set()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(enter).result()


def test_a_stopped_run_ends_well_and_a_lost_process_with_one_line(monkeypatch, capsys):
    run(monkeypatch, lambda config: sys.exit(0), "--name", "a")

    def lost(config):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234")

    with pytest.raises(RuntimeError):           # one process alone has lost something else
        run(monkeypatch, lost, "--name", "a")
    monkeypatch.setattr(launch.dist, "is_initialized", lambda: True)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, lost, "--name", "a")
    assert stop.value.code == 1 and "another process" in capsys.readouterr().err
