"""Commands side by side: order, failures, and a stop that loses nothing."""
import signal
import subprocess
import sys
import time

from conftest import ROOT

from lab import jobs

WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('')"


def job(folder, name, *commands, needs=None):
    return jobs.Job(name, folder / name, [[sys.executable, "-c", *map(str, command)] for command in commands], needs)


def test_a_job_waits_for_its_need_and_its_commands_follow_each_other(tmp_path):
    """`second` would fail without what `first` writes, and each of its commands without the one before."""
    first = job(tmp_path, "first", ("import time; time.sleep(0.5)",), (WRITE, tmp_path / "a"))
    second = job(tmp_path, "second", (f"open({str(tmp_path / 'a')!r}); " + WRITE, tmp_path / "b"),
                 (f"open({str(tmp_path / 'b')!r})",), needs=first)
    ended = []
    assert jobs.run([first, second], 2, 1, lambda job: ended.append(job.name) or "fine") == []
    assert ended == ["first", "second"]


def test_at_most_so_many_side_by_side(tmp_path):
    """Each notes when it began and ended; of three jobs two are never three at a time, and two do overlap. Each has
    the threads that it is given."""
    code = ("import os, time; print('at', time.time(), flush=True); time.sleep(0.6); print('at', time.time()); "
            "print('threads', os.environ['OMP_NUM_THREADS'])")
    assert jobs.run([job(tmp_path, name, (code,)) for name in "abc"], 2, 3, lambda job: "") == []
    spans = []
    for name in "abc":
        lines = (tmp_path / f"{name}.log").read_text().splitlines()
        spans.append([float(line.split()[1]) for line in lines if line.startswith("at")])
        assert lines[-1] == "threads 3"
    spans.sort()
    assert spans[1][0] < spans[0][1] and spans[2][0] > min(spans[0][1], spans[1][1])


def test_a_failure_is_named_and_takes_what_needs_it_along(tmp_path, capsys):
    bad = job(tmp_path, "bad", ("print('the disk is full'); exit(3)",))
    killed = job(tmp_path, "killed", ("import os; os.kill(os.getpid(), 9)",), (WRITE, tmp_path / "never"))
    after, other = job(tmp_path, "after", ("",), needs=bad), job(tmp_path, "other", ("",))
    ended = []
    failed = jobs.run([bad, killed, after, other], 1, 1, lambda job: ended.append(job.name) or "")
    assert sorted(failed) == ["after", "bad", "killed"] and ended == ["other"]
    assert not (tmp_path / "never").exists()
    printed = capsys.readouterr().out
    assert f"bad: FAILED with exit code 3: the disk is full  ({tmp_path / 'bad.log'})" in printed
    assert "killed: FAILED with exit code -9" in printed


def test_a_stop_reaches_what_runs(tmp_path):
    """SIGTERM ends the program and what it started, and nothing new begins."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from lab import jobs
sleeper = "import signal, sys, time; from pathlib import Path; " \\
          "signal.signal(15, lambda *_: (Path('stopped').touch(), sys.exit())); Path('began').touch(); time.sleep(60)"
jobs.run([jobs.Job(name, Path(name), [[sys.executable, "-c", sleeper]]) for name in "ab"], 1, 1, lambda job: "")
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    while not (tmp_path / "began").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert (tmp_path / "stopped").exists() and (tmp_path / "a.log").exists() and not (tmp_path / "b.log").exists()
