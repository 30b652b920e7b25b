"""One run in one folder: its lock, its signals, which run may go on, bad steps, and what a kill leaves behind."""
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    FORKS,
    assert_close_figures,
    assert_same,
    command,
    finish,
    fork,
    outcome,
    read_rows,
    start,
)
from torch import nn

import grpo
import sft
import train
from engine import checkpoint, files, run
from engine.batches import Batch
from engine.run import LOCK, STOPPING, Run, occupied, one_run, stop_signals

NAN = float("nan")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "train.txt").write_text("A 0.0 1.0##a person sits.\n")
    return train.Config(model=str(tmp_path / "model"), annotations=str(tmp_path / "train.txt"),
                        videos="videos", output=str(tmp_path / "run"))


def begin(config):
    """A Run with a policy of two weights."""
    policy = nn.Linear(1, 1)
    begun = Run(config)
    begun.restore(policy, torch.optim.AdamW(policy.parameters(), lr=0.1))
    return begun


def take_steps(begun, *losses):
    """One step per loss."""
    task = SimpleNamespace(name="VD", part="vd")
    row = {"index": 0, "reward": 0.0, "format": 0.0, "vd": 0.0, "tokens": 1, "advantage": 0.0}
    for step, loss in zip(begun.steps("test"), losses):
        begun.log(step, {"loss": loss, "kl": 0.0}, Batch(task, [], 0), [row])
        begun.save_if_due(step)


def save(config):
    """A checkpoint after three steps, one of them bad."""
    begun = begin(config)
    state = {"step": 3, "bad_steps": 1, "bad_in_a_row": [], "files": begun.files,
             "config": asdict(config)}
    folder = begun.output / "checkpoints" / "step_000003"
    checkpoint.write(folder, state, begun.policy, begun.optimizer)


# Which run may go on

def test_a_folder_in_use_is_refused(config, tmp_path):
    output = tmp_path / "run"
    Run(config)                                             # there is none yet
    output.mkdir()
    Run(config)                                             # it is empty
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="--output .*run is not empty; give --resume"):
        Run(config)
    with pytest.raises(ValueError, match="--output .*train.txt is not empty"):
        Run(replace(config, output=config.annotations))
    assert Run(replace(config, resume=True)).step == 0      # without a checkpoint --resume begins


@pytest.mark.parametrize("flag, value", [
    ("seed", 5), ("group_size", 4), ("beta", 0.5), ("tasks", ["VC"]), ("model", "other"),
    ("think", False), ("loss_type", "bnpo"), ("scale_rewards", "none"), ("num_iterations", 2),
    ("epsilon", 0.3), ("max_tokens", 9), ("eval_annotations", "test.txt"), ("eval_samples", 3),
    ("lora_rank", 4), ("freeze_vision", True)])
def test_only_the_same_run_goes_on(config, flag, value):
    save(config)
    with pytest.raises(ValueError) as error:
        Run(replace(config, resume=True, **{flag: value}))
    place = f"{config.output}/checkpoints/step_000003"
    before = getattr(config, flag)
    assert f"--{flag} {value}: {place} was made with {before};" in str(error.value)


def test_a_run_killed_before_its_first_checkpoint_is_known_by_its_config(config):
    files.write_config(config, config.output)
    assert Run(replace(config, resume=True)).step == 0
    with pytest.raises(ValueError, match="--seed 5: .*run was made with 0"):
        Run(replace(config, resume=True, seed=5))


def test_the_run_of_another_script_is_refused(config):
    other = sft.Config(model=config.model, annotations=config.annotations, videos=config.videos,
                       output=config.output, resume=True)
    files.write_config(config, config.output)
    with pytest.raises(ValueError, match="run was made by another script.*--batch_size"):
        Run(other)
    shutil.rmtree(config.output)
    save(config)
    with pytest.raises(ValueError, match="step_000003 was made by another script.*--batch_size"):
        Run(other)


def test_a_finished_run_without_its_checkpoints_is_refused(config, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match="run holds a finished run without a checkpoint"):
        Run(replace(config, resume=True))


def test_what_may_change_is_said(config, tmp_path):
    save(config)
    again = Run(replace(config, resume=True))
    assert (again.step, again.bad_steps, again.notes) == (3, 1, [])
    (tmp_path / "train.txt").write_text("")
    steps, rate, file = Run(replace(config, resume=True, learning_rate=1e-7, steps=9)).notes
    assert steps == "--steps was 1000, is 9 from step 3 on"
    assert rate == "--learning_rate was 1e-06, is 1e-07 from step 3 on"
    assert file.startswith("train.txt has another size or date than when ")
    assert "only model/ is written" in Run(replace(config, resume=True, steps=3)).notes[-1]


# Steps and their end

def test_checkpoints_are_written_when_due(config):
    take_steps(begin(replace(config, steps=5, save_every=2)), *[1.0] * 5)
    names = [path.name for path in checkpoint.finished(config.output)]
    assert names == ["step_000004", "step_000005"]
    shutil.rmtree(config.output)
    take_steps(begin(replace(config, steps=5, save_every=0)), *[1.0] * 5)
    assert [path.name for path in checkpoint.finished(config.output)] == ["step_000005"]


def test_ten_bad_steps_in_a_row_end_the_run(config):
    """Flat batches, which have no loss, are no steps of the row and do not end it. The newest checkpoint is from before
    the trouble."""
    begun = begin(replace(config, save_every=1))
    take_steps(begun, NAN, 1.0)
    with pytest.raises(ValueError) as error:
        take_steps(begun, NAN, NAN, None, *[NAN] * 9)
    back = checkpoint.newest(config.output)
    assert back.name == "step_000002"
    message = str(error.value)
    assert message.startswith("not finite: loss in step 2, loss in step 3, loss in step 5, ")
    assert message.endswith(f"that is 10 steps in a row. Go back to {back} with --resume and a "
                            "lower --learning_rate, or further by deleting it")
    rows = read_rows(Path(config.output, "metrics.jsonl"))
    assert [row["bad_steps"] for row in rows] == [1, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11]


def test_a_stop_after_a_bad_step_is_resumed_as_it_was(config):
    begun = begin(replace(config, save_every=1))
    take_steps(begun, NAN)
    assert checkpoint.newest(config.output) is None             # none on the way through bad steps
    begun.stop.set()
    with pytest.raises(SystemExit) as stop:
        take_steps(begun, NAN)
    assert stop.value.code == 0
    again = Run(replace(config, save_every=1, resume=True))
    assert (again.step, again.bad_steps) == (2, 2)
    assert again.bad_in_a_row == ["loss in step 0", "loss in step 1"]


def test_all_processes_stop_when_one_is_asked_to(config, monkeypatch):
    """`gather` has the answer of another process, too."""
    begun, other = begin(config), [False]
    monkeypatch.setattr(run, "gather", lambda mine: mine + other * (mine == [False]))
    take_steps(begun, 1.0)
    assert checkpoint.newest(config.output) is None
    other[0] = True
    with pytest.raises(SystemExit):
        take_steps(begun, 1.0)
    assert checkpoint.newest(config.output).name == "step_000002"


# Signals

@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_asks_and_a_later_one_ends(monkeypatch, capfd, number):
    now, ended, stop = [0.0], [], Event()
    signal.signal(number, signal.SIG_DFL)       # in the background of a shell some are ignored
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    with stop_signals(stop):
        assert not stop.is_set()
        for now[0] in (10.0, 11.5):             # the same one, from torchrun and from a scheduler
            signal.raise_signal(number)
            assert stop.is_set()
        assert capfd.readouterr().err.count("stopping after this step") == 1
        monkeypatch.setattr(signal, "raise_signal",
                            lambda again: ended.append((again, signal.getsignal(again))))
        now[0] = 13.0
        os.kill(os.getpid(), number)
    assert ended == [(number, signal.SIG_DFL)]
    assert signal.getsignal(number) is signal.SIG_DFL


def test_other_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGTERM)

    def enter():
        with stop_signals(Event()):
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() is before


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals(Event()):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# The lock

@one_run
def wait(config):
    Path(config.output, "begun").touch()
    time.sleep(60)


def test_two_runs_with_one_output(config):
    """The second one names the first, and a kill leaves the folder free."""
    output = Path(config.output)
    first = FORKS.Process(target=wait, args=(config,))
    fork([first])
    wait_for(lambda: (output / "begun").exists(), first)
    holder = f"--output {output} is in use by process {first.pid} on .*; give another"
    with pytest.raises(ValueError, match=holder):
        wait(config)
    first.kill()
    first.join()
    (output / "begun").unlink()
    assert not occupied(output) and (output / LOCK).exists()
    ended = []
    one_run(ended.append)(config)
    assert ended == [config]
    assert not output.exists()                  # nothing was written to it


# Processes that are killed

def wait_for(condition, process, seconds=60):
    """Wait until the condition holds, or the process ends."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.is_alive() and not condition():
        time.sleep(0.002)


def lines(path):
    """How many whole lines a file has, 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_and_interrupted_is_unbroken(unbroken, tmp_path):
    """SIGTERM in a step, SIGKILL in a checkpoint and while the final model is written."""
    output, log = tmp_path / "run", tmp_path / "log"
    settings = replace(unbroken, output=str(output), resume=True)
    for number, is_time in (
            (signal.SIGTERM, lambda: lines(output / "metrics.jsonl") == 1),
            (signal.SIGKILL, lambda: (output / "checkpoints" / "step_000004.tmp").exists()),
            (signal.SIGKILL, lambda: (output / "model.tmp").exists())):
        process, = start("train", settings, log)
        wait_for(is_time, process)
        assert process.is_alive(), Path(f"{log}.0").read_text()[-2000:]
        os.kill(process.pid, number)
        process.join(30)
        assert process.exitcode == (-9 if number == signal.SIGKILL else 0)
        if number == signal.SIGTERM:
            stopped = checkpoint.newest(output)
            assert stopped and int(stopped.name[5:]) == lines(output / "metrics.jsonl")
    assert finish(start("train", settings, log)) == [0], Path(f"{log}.0").read_text()[-2000:]
    assert_same(outcome(output), outcome(unbroken.output))


@pytest.mark.processes
def test_two_processes_of_torchrun_stopped_and_continued_by_one(unbroken, tmp_path):
    """SIGTERM reaches both by way of torchrun; they stop after the same step with a checkpoint, and one process goes on
    with the same global batches."""
    output = tmp_path / "run"
    settings = replace(unbroken, output=str(output))
    process = command("train.py", settings, tmp_path / "log", processes=2)
    began = time.monotonic()
    while not lines(output / "metrics.jsonl") and time.monotonic() - began < 170:
        time.sleep(0.01)
    process.terminate()
    process.wait(30)
    text = (tmp_path / "log").read_text()
    assert text.count("stopping after this step") == 1
    assert text.count("Traceback") == 1                         # torchrun's own
    stopped = checkpoint.newest(output)
    assert 0 < lines(output / "metrics.jsonl") == int(stopped.name[5:]) < 5
    assert not (output / "model").exists()
    train.main(replace(settings, resume=True))
    assert_close_figures(unbroken.output, output, rel=1e-3)


def die_at_step_1(rank):
    """In the second step rank 1 is killed, and the other waits for it in a collective."""
    update, calls = grpo.update, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*args, **kwargs)

    grpo.update = dying


@pytest.mark.processes
def test_a_process_that_is_lost_ends_the_run(unbroken, tmp_path):
    settings = replace(unbroken, output=str(tmp_path / "run"))
    began = time.monotonic()
    started = start("train", settings, tmp_path / "log", 2, die_at_step_1)
    assert finish(started) == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 120
    text = (tmp_path / "log.0").read_text()
    assert "another process of the run" in text.splitlines()[-1] and "Traceback" not in text
