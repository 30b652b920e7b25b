"""Many commands, some side by side: what waits for what, and that nothing is lost when they are stopped."""
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from engine import logs
from engine.run import stop_signals


@dataclass
class Job:
    """Commands that follow each other, each a list of words, and the folder they write to."""
    name: str
    folder: Path
    commands: list[list[str]]
    needs: "Job | None" = None      # begins when that one has ended well
    began: float = 0.0              # when, by time.monotonic()

    @property
    def log(self) -> Path:
        """What the commands print; beside the folder, which may have to be empty."""
        return self.folder.with_name(self.folder.name + ".log")


def run(jobs: list[Job], parallel: int, threads: int, finish: Callable[[Job], str]) -> list[str]:
    """Run jobs in their order, at most `parallel` side by side, each with as many CPU threads (0: as many as it likes);
    a job that another needs has to stand before it. `finish` is called with each job that has ended well, and returns
    what to say of it.

    Returns the names of the jobs that failed, or whose need did. A signal that stops this passes on to all of them, and
    ends the program when they have ended: train.py does so with a checkpoint.
    """
    waiting, failed, done = list(jobs), [], 0
    running = {}            # {process: (its job, the commands that follow)}
    began = time.monotonic()
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    stop = threading.Event()
    with stop_signals(stop):
        while waiting or running:
            for job in list(waiting):
                if job.needs and job.needs.name in failed:
                    waiting.remove(job)
                    failed.append(job.name)
            not_done = {job.name for job in waiting} | {job.name for job, _ in running.values()}
            for job in list(waiting):
                is_ready = job.needs is None or job.needs.name not in not_done
                if is_ready and len(running) < parallel:
                    waiting.remove(job)
                    job.began = time.monotonic()
                    running[start(job, job.commands[0], environment)] = job, job.commands[1:]
            time.sleep(0.2)
            if stop.is_set():
                end(running)
            for process in [process for process in running if process.poll() is not None]:
                job, following = running.pop(process)
                if process.returncode:
                    failed.append(job.name)
                    code = process.returncode
                    logs.say(f"{job.name}: FAILED with exit code {code}: {last_line(job.log)}")
                elif following:
                    running[start(job, following[0], environment)] = job, following[1:]
                else:
                    done += 1
                    now = time.monotonic()
                    left = (now - began) / done * (len(waiting) + len(running)) / 60
                    logs.say(f"{done}/{len(jobs)} {job.name}: {finish(job)}, "
                             f"{now - job.began:.0f} s; about {left:.0f} minutes left")
    return failed


def start(job: Job, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """Start a command of a job in a session of its own, so that a Ctrl-C does not reach it twice."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a", encoding="utf-8") as log:
        log.write(shlex.join(command) + "\n")
        log.flush()
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment,
                                start_new_session=True)


def end(processes: Iterable[subprocess.Popen]) -> None:
    """Pass a signal on, wait, and end this program, too."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()
    sys.exit(0)


def last_line(log: Path) -> str:
    """What a log ends with, and where it is."""
    lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace").strip())
    return f"{lines[-1]}  ({log})"
