"""Flags, one-line errors, signals, whole files."""
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine import distributed, files, logs
from engine.run import LOCK, STOPPING, occupied, stop_signals


@dataclass
class Config:
    name: str
    count: int = field(default=3, metadata={"help": "how many"})


def run(monkeypatch, main, *flags):
    monkeypatch.setattr(sys, "argv", ["x.py", *flags])
    flags.command_line(Config, main, "What x.py does.\n\nMore.")


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
    files.write_whole(tmp_path / "new" / "a.txt", "one")
    files.write_whole(tmp_path / "new" / "a.txt", "two")
    assert (tmp_path / "new" / "a.txt").read_text() == "two" and len(list((tmp_path / "new").iterdir())) == 1
    files.write_config(Config("a"), tmp_path)
    assert '"count": 3' in (tmp_path / "config.json").read_text()


def test_one_process_gathers_itself():
    assert distributed.gather([1, 2]) == [1, 2]


def test_rows_are_json_even_if_numbers_are_not_finite(tmp_path):
    files.append(tmp_path / "log", [{"a": float("nan"), "b": 1.0}])
    files.append(tmp_path / "log", [{"a": None, "c": [1], "d": -float("inf")}])
    assert (tmp_path / "log").read_text() == '{"a": null, "b": 1.0}\n{"a": null, "c": [1], "d": null}\n'
    with pytest.raises(OSError, match="nowhere/log: could not be written .No such"):
        files.append(tmp_path / "nowhere" / "log", [])


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_asks_and_a_later_one_ends(monkeypatch, capfd, number):
    before, now, ended = signal.SIG_DFL, [0.0], []
    signal.signal(number, before)       # in the background of a shell some are ignored
    monkeypatch.setattr(launch.time, "monotonic", lambda: now[0])
    with stop_signals() as stop:
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
        with stop_signals() as stop:
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


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN != signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


def script(tmp_path, body):
    """A script whose main(config) is `body`, as a process."""
    path = tmp_path / "x.py"
    path.write_text("from dataclasses import dataclass\nimport os, sys, time\nfrom engine import launch\n"
                    "@dataclass\nclass Config:\n    output: str = 'run'\n"
                    f"@one_run\ndef main(config):\n    {body}\nlaunch.command_line(Config, main, 'x')\n")
    return lambda **options: subprocess.Popen(
        [sys.executable, str(path)], cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(launch.__file__).parent.parent)}, **options)


def test_two_runs_with_one_output(tmp_path):
    """The second names the first, writes nothing and ends with 2; a killed run leaves the folder free."""
    start = script(tmp_path, "print('here', flush=True); time.sleep(60)")
    with start() as first:
        assert first.stdout.readline() == "here\n"
        with start() as second:
            assert second.wait(60) == 2 and second.stdout.read() == ""
            said = second.stderr.read()
        assert f"--output run is in use by process {first.pid} on" in said and said.count("\n") == 1
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
        first.kill()
    assert not occupied(tmp_path / "run")
    with script(tmp_path, "pass")() as third:
        assert third.wait(60) == 0 and not (tmp_path / "run").exists()      # nothing was written


def test_ctrl_c_is_one_line(tmp_path):
    with script(tmp_path, "print('here', flush=True); time.sleep(60)")() as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        said = process.stderr.read()
    assert said.strip().startswith("x.py: stopped; the same command") and said.strip().count("\n") == 0


def test_a_closed_pipe_ends_nothing(tmp_path):
    body = ("\n    for i in range(3000): print('x' * 50, flush=i % 7 == 0)\n    print('y', file=sys.stderr)\n"
            "    open('run/done', 'w').write('1')")
    with script(tmp_path, body)() as process:
        process.stdout.close()
        process.stderr.close()
        assert process.wait(60) == 0 and (tmp_path / "run" / "done").exists()


def test_logs_show_no_control_characters(monkeypatch, capsys):
    logs.say("id \x1b[2J\x07 ok é\u202e")
    assert capsys.readouterr().out == "id \\x1b[2J\\x07 ok é\\u202e\n"

    def fail(config):
        raise ValueError("bad \x1b[31m name")

    with pytest.raises(SystemExit):
        run(monkeypatch, fail, "--name", "a")
    assert "bad \\x1b[31m name" in capsys.readouterr().err
