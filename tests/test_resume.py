"""A run that is killed, interrupted, short of disk or fed numbers that are not finite goes on to the bit, or says why
not."""
import json
import os
import random
import resource
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import command, finish, start
from safetensors.torch import load_file
from test_train import assert_about_same_weights, config, rows, sft_config

import grpo
import train
from engine import checkpoint

CLOCK = {"seconds", "tokens_per_second"}


def wait_for(condition, process, seconds=60):
    """Whether it came true before the process ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.is_alive():
        if condition():
            return True
        time.sleep(0.002)
    return condition()


def lines(path):
    """How many whole lines a file has, 0 where there is none."""
    return Path(path).read_bytes().count(b"\n") if Path(path).exists() else 0


def outcome(output):
    """All that two runs have to share: logs without the clock, samples, final weights."""
    logs = [{key: value for key, value in row.items() if key not in CLOCK} for row in rows(output / "metrics.jsonl")]
    samples = (output / "samples.jsonl").read_text() if (output / "samples.jsonl").exists() else ""
    return logs, samples, load_file(output / "model" / "model.safetensors")


def assert_same(one, other):
    assert one[0] == other[0] and one[1] == other[1] and one[2].keys() == other[2].keys()
    assert all(torch.equal(one[2][name], other[2][name]) for name in one[2])


def survive(settings, script, kills, log):
    """Start again and again until a run ends by itself; `kills` are (signal, when(output) or seconds). Returns how many
    of them hit."""
    output, hit = Path(settings.output), 0
    for number, when in kills:
        process, = start(script, replace(settings, resume=True), log)
        began = time.monotonic()
        if wait_for(lambda: when(output) if callable(when) else time.monotonic() - began > when, process):
            os.kill(process.pid, number)
            hit += process.is_alive()
        process.join(30)
        assert process.exitcode == (-9 if number == signal.SIGKILL else 0), Path(f"{log}.0").read_text()[-2000:]
    assert finish(start(script, replace(settings, resume=True), log)) == [0], Path(f"{log}.0").read_text()[-2000:]
    return hit


@pytest.fixture(scope="module")
def unbroken(folder, warm, tmp_path_factory):
    """The settings and the outcome of a run that nobody disturbs."""
    output = tmp_path_factory.mktemp("unbroken") / "run"
    settings = config(folder, output, steps=5, save_every=2, tvg_prob=1, keep=1)
    assert finish(start("train", settings, output.with_suffix(".log"))) == [0]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_000005"]     # --keep 1
    return settings, outcome(output)


def test_killed_and_interrupted_is_unbroken(unbroken, tmp_path):
    """SIGTERM in a step, SIGKILL in a step, in a checkpoint and while the final model is written."""
    assert survive(replace(unbroken[0], output=str(tmp_path / "run")), "train", [
        (signal.SIGTERM, lambda output: lines(output / "metrics.jsonl") == 1),
        (signal.SIGKILL, lambda output: lines(output / "metrics.jsonl") == 3),
        (signal.SIGKILL, lambda output: (output / "checkpoints" / "step_000004.tmp").exists()),
        (signal.SIGKILL, lambda output: (output / "model.tmp").exists())], tmp_path / "log") == 4
    assert_same(outcome(tmp_path / "run"), unbroken[1])


@pytest.mark.soak
def test_fifty_random_kills(folder, warm, tmp_path):
    """A checkpoint after every step, and kills so soon after each other that fifty fit into a run of a hundred steps.
    Prints (pytest -s) where they hit."""
    settings = config(folder, tmp_path / "unbroken", steps=100, save_every=1)
    log, moments, killed = tmp_path / "log.0", random.Random(), 0
    log.write_text("")
    process, = start("train", settings, tmp_path / "log")
    wait_for(lambda: "process(es) on" in log.read_text(), process)
    began = time.monotonic()
    assert finish([process], 600) == [0]
    longest = (time.monotonic() - began) / 40               # of training between two kills
    settings = replace(settings, output=str(tmp_path / "run"), resume=True)
    for number in range(50):
        log.write_text("")
        process, = start("train", settings, tmp_path / "log")
        wait_for(lambda: "process(es) on" in log.read_text(), process)
        process.join(moments.uniform(0, longest))
        ended = process.exitcode
        killed += ended is None
        process.kill()
        process.join()
        assert ended in (None, 0), log.read_text()[-2000:]
        print(number, "ended" if ended == 0 else "killed", checkpoint.newest(settings.output),
              lines(tmp_path / "run" / "metrics.jsonl"), *(path.name for path in (tmp_path / "run").rglob("*.tmp")))
    assert killed >= 40 and finish(start("train", settings, tmp_path / "log"), 600) == [0]
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "unbroken"))


@pytest.mark.processes
def test_sft_killed_is_unbroken(folder, tmp_path):
    settings = sft_config(folder, tmp_path / "run", save_every=2)
    assert finish(start("sft", replace(settings, output=str(tmp_path / "unbroken")), tmp_path / "log")) == [0]
    assert survive(settings, "sft", [(signal.SIGKILL, lambda output: lines(output / "metrics.jsonl") == 3)],
                   tmp_path / "log") == 1
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "unbroken"))


@pytest.mark.parametrize("way", ["forked", pytest.param("torchrun", marks=pytest.mark.processes)])
def test_two_processes_stopped_and_continued_by_one(unbroken, tmp_path, way):
    """SIGTERM reaches two processes, of torchrun by way of that, both stop after the same step with a checkpoint and
    exit code 0, and one process goes on with the same global batches."""
    settings, (_, samples, weights) = unbroken
    settings = replace(settings, output=str(tmp_path / "run"))
    begun = lambda: lines(tmp_path / "run" / "metrics.jsonl")
    if way == "torchrun":
        process = command("train.py", settings, tmp_path / "log", processes=2)
        began = time.monotonic()
        while not begun() and process.poll() is None and time.monotonic() - began < 100:
            time.sleep(0.01)
        process.terminate()
        process.wait(30)
        tracebacks = 1                                          # torchrun has its own
    else:
        started, tracebacks = start("train", settings, tmp_path / "log", 2), 0
        assert wait_for(begun, started[0])
        for process in started:
            process.terminate()
        assert finish(started) == [0, 0]
    text = "".join(path.read_text() for path in tmp_path.glob("log*"))
    stopped = checkpoint.newest(tmp_path / "run")
    assert text.count("stopping after this step") == 1 and text.count("Traceback") == tracebacks, text
    assert stopped and 0 < begun() == int(stopped.name[5:]) < 5
    assert not (tmp_path / "run" / "model").exists()
    assert finish(start("train", replace(settings, resume=True), tmp_path / "one")) == [0]
    assert [(row["index"], row["completion"]) for row in rows(tmp_path / "run" / "samples.jsonl")] == \
        [(row["index"], row["completion"]) for row in map(json.loads, samples.splitlines())]
    before = load_file(Path(settings.model) / "model.safetensors")
    assert_about_same_weights(before, weights, outcome(tmp_path / "run")[2])


@pytest.mark.processes
def test_the_command_killed_is_unbroken(unbroken, tmp_path):
    """As a person starts it, with processes that decode."""
    settings = replace(unbroken[0], output=str(tmp_path / "run"), cache="", resume=True)
    for ends in (False, True):
        process = command("train.py", settings, tmp_path / "log")
        while not ends and lines(tmp_path / "run" / "metrics.jsonl") < 3 and process.poll() is None:
            time.sleep(0.002)
        if not ends:
            process.kill()
        assert process.wait(100) == (0 if ends else -signal.SIGKILL), (tmp_path / "log").read_text()[-2000:]
    assert_same(outcome(tmp_path / "run"), unbroken[1])


def break_rank_1(rank, error):
    """In the second step rank 1 alone fails, and the other waits for it in a collective."""
    step, calls = train.take_step, []

    def take_step(*args):
        calls.append(1)
        if len(calls) == 2 and rank == 1:
            error()
        return step(*args)

    train.take_step = take_step


def raises(rank):
    def error():
        raise ValueError("this one is to blame")
    break_rank_1(rank, error)


def dies(rank):
    break_rank_1(rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.processes
@pytest.mark.parametrize("change, code", [(raises, 2), (dies, -9)])
def test_a_rank_that_ends_ends_the_run(unbroken, tmp_path, change, code):
    began = time.monotonic()
    started = start("train", replace(unbroken[0], output=str(tmp_path / "run")), tmp_path / "log", 2, change)
    assert finish(started) == [1, code] and time.monotonic() - began < 120
    texts = [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
    assert "another process of the run" in texts[0].splitlines()[-1] and "Traceback" not in "".join(texts), texts[0]
    assert code != 2 or texts[1].splitlines()[-1].startswith("train.py: this one is to blame")


def poison_rank_1(rank):
    """From its second step on, rank 1 has a loss that is not a number."""
    loss, calls = grpo.loss, []

    def poisoned(*args):
        value, *others = loss(*args)
        calls.append(1)
        return (value * float("nan") if rank == 1 and len(calls) > 1 else value), *others

    grpo.loss = poisoned


def test_two_processes_skip_alike_and_name_the_way_back(unbroken, tmp_path):
    settings = replace(unbroken[0], output=str(tmp_path / "run"), save_every=1, max_bad_steps=2)
    assert finish(start("train", settings, tmp_path / "log", 2, poison_rank_1)) == [2, 2]
    numbers = rows(tmp_path / "run" / "metrics.jsonl")
    first = next(i for i, row in enumerate(numbers) if row["bad_steps"] == 1)
    assert numbers[-1]["bad_steps"] == 2 and all(row["loss"] is None for row in numbers[first:])
    back = checkpoint.newest(tmp_path / "run")
    assert back.name == f"step_{first:06d}"                                     # none from the bad steps
    for rank in range(2):
        line = (tmp_path / f"log.{rank}").read_text().splitlines()[-1]
        assert f": loss and grad_norm in step {first}, loss" in line and f"Go back to {back} " in line


@pytest.mark.parametrize("fault", ["reward", "loss", "grad_norm"])
def test_a_step_that_is_not_finite_changes_nothing(unbroken, tmp_path, monkeypatch, capsys, fault):
    """The second step that is no flat one is poisoned; the others train."""
    step, loss, clip, calls, changed = train.take_step, grpo.loss, torch.nn.utils.clip_grad_norm_, [], []

    def take_step(config, policy, reference, optimizer, passes, numbers, world):
        before = [p.detach().clone() for p in policy.parameters()]
        calls.append(1)
        if fault == "reward" and len(calls) == 2:
            numbers = {**numbers, "reward": float("inf")}
        numbers = step(config, policy, reference, optimizer, passes, numbers, world)
        changed.append(not all(torch.equal(a, b) for a, b in zip(before, policy.parameters())))
        assert all(p.grad is None for p in policy.parameters())
        return numbers

    def poisoned_loss(*args):
        value, *others = loss(*args)
        return value * (float("nan") if fault == "loss" and len(calls) == 2 else 1), *others

    def poisoned_clip(parameters, length):
        parameters = list(parameters)
        if fault == "grad_norm" and len(calls) == 2:
            parameters[0].grad[0] = float("inf")
        return clip(parameters, length)

    monkeypatch.setattr(train, "take_step", take_step)
    monkeypatch.setattr(grpo, "loss", poisoned_loss)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned_clip)
    train.main(replace(unbroken[0], output=str(tmp_path / "run"), steps=4))
    numbers = [json.loads(line, parse_constant=pytest.fail) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert len(calls) >= 3 and numbers[-1]["bad_steps"] == 1
    bad = next(i for i, row in enumerate(numbers) if row["bad_steps"])
    assert numbers[bad][fault] is None
    assert changed == [i != bad for i, row in enumerate(numbers) if row["flat"] < 1]
    named, = [line for line in capsys.readouterr().out.splitlines() if "changes nothing" in line]
    assert f"step {bad} " in named and fault in named


@contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint_whole(unbroken, tmp_path):
    settings = replace(unbroken[0], output=str(tmp_path / "run"), steps=1)
    train.main(settings)
    settings = replace(settings, steps=3, save_every=2, resume=True)
    small = (tmp_path / "run" / "config.json").stat().st_size + 50      # which is written, too
    for size, culprit in ((1_000_000, "checkpoints/step_000002: "), (small, "samples.jsonl: ")):
        with full_disk(size), pytest.raises(OSError, match=f"run/{culprit}could not be written .*File too large"):
            train.main(settings)
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000001"]
    train.main(settings)
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]
    with full_disk(1_000_000), pytest.raises(OSError, match="run/model: could not be written .*File too large"):
        train.main(settings)                                                    # all steps done: only the model
    assert outcome(tmp_path / "run")[2].keys() == unbroken[1][2].keys()         # the old one is still there
