"""Many commands, some side by side: what waits for what, and that nothing is lost when they are stopped."""
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
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
    begun: float = 0.0              # when, by time.monotonic()

    @property
    def log(self) -> Path:
        """What the commands print; beside the folder, which may have to be empty."""
        return self.folder.with_name(self.folder.name + ".log")


def run(jobs: list[Job], at_once: int, threads: int, finish: Callable[[Job], str]) -> list[str]:
    """Run jobs in their order, `at_once` side by side, each with as many CPU threads (0: as many as it likes); one that
    another needs has to stand before it. `finish` is called when one has ended well, and returns what to say of it.

    Returns the names of those that failed, or whose need did. A signal that stops this passes on to all of them, and
    ends the program when they have ended: train.py does so with a checkpoint.
    """
    waiting, running, failed = list(jobs), {}, []
    began, environment = time.monotonic(), {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}

    def start(job: Job, commands: list[list[str]]) -> None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "a", encoding="utf-8") as log:
            log.write(shlex.join(commands[0]) + "\n")
            log.flush()
            process = subprocess.Popen(commands[0], stdout=log, stderr=log, env=environment, start_new_session=True)
        running[process] = job, commands[1:]

    stop = threading.Event()
    with stop_signals(stop):
        while waiting or running:
            lost = [job for job in waiting if job.needs and job.needs.name in failed]
            failed += [job.name for job in lost]
            busy = {id(job) for job in waiting} | {id(job) for job, _ in running.values()}
            waiting = [job for job in waiting if job not in lost]
            for job in [job for job in waiting if id(job.needs) not in busy][:at_once - len(running)]:
                waiting.remove(job)
                job.begun = time.monotonic()
                start(job, job.commands)
            time.sleep(0.2)
            if stop.is_set():
                for process in running:
                    process.terminate()
                for process in running:
                    process.wait()
                sys.exit(0)
            for process in [process for process in running if process.poll() is not None]:
                job, left = running.pop(process)
                if process.returncode:
                    failed.append(job.name)
                    logs.say(f"{job.name}: FAILED with exit code {process.returncode}: {last_line(job.log)}")
                elif left:
                    start(job, left)
                else:
                    said, ended = finish(job), len(jobs) - len(waiting) - len(running) - len(failed)
                    rest = (time.monotonic() - began) / ended * (len(waiting) + len(running)) / 60
                    logs.say(f"{ended}/{len(jobs)} {job.name}: {said}, {time.monotonic() - job.begun:.0f} s; "
                               f"about {rest:.0f} minutes left")
    return failed


def last_line(log: Path) -> str:
    """What a log ends with, and where it is."""
    lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace").strip())
    return f"{lines[-1]}  ({log})"
