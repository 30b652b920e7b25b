"""Checkpoints: to the bit, whole or not at all, for any number of processes; and the best model of a run."""
import json
import pickle
import shutil

import pytest
import torch
import torch.distributed as dist
from conftest import full_disk, read_rows, together, whole
from torch import nn
from torch.distributed.fsdp import fully_shard

from engine import checkpoint
from engine.checkpoint import Evaluations

STATE = {"step": 3, "bad_steps": 1, "bad_in_a_row": [], "files": {}, "config": {}}


def small(steps=0, seed=0, hidden=5):
    """A model, its second layer with fewer rows than there are processes, its third frozen, and its optimizer."""
    torch.manual_seed(seed)
    frozen = nn.Linear(1, 2).requires_grad_(False)
    policy = nn.Sequential(nn.Linear(3, hidden), nn.Linear(hidden, 1), frozen)
    if dist.is_initialized():
        fully_shard(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    for step in range(steps):
        learn(policy, optimizer, step)
    return policy, optimizer


def learn(policy, optimizer, step):
    policy(torch.ones(2, 3) + step).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def tensors(policy, optimizer):
    content = checkpoint.tensors(policy, optimizer)
    return {name: whole(value.detach()) for name, value in content.items()}


def assert_equal(one, other):
    torch.testing.assert_close(tensors(*one), tensors(*other), rtol=0, atol=0)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints" / "step_000003"


@pytest.mark.parametrize("steps", [0, 3])
def test_all_comes_back_to_the_bit(folder, steps):
    one = small(steps)
    checkpoint.write(folder, STATE, *one)
    other = small(seed=1)
    checkpoint.restore(folder, *other)
    assert_equal(one, other)
    # AdamW has three tensors per weight that it has stepped on
    assert len(tensors(*other)) == (6 + 4 * 3 if steps else 6)
    learn(*one, steps)                          # and both go on alike
    learn(*other, steps)
    assert_equal(one, other)


def test_nothing_is_pickled(folder, monkeypatch):
    names = {pickle: ("dump", "load", "loads", "Unpickler"), torch: ("save", "load")}
    for module, functions in names.items():
        for name in functions:
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a pickle"))
    checkpoint.write(folder, STATE, *small(3))
    checkpoint.restore(folder, *small())
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_the_newest_are_kept(folder):
    """By number and not by name. A folder that a person named stays, an unfinished one goes."""
    output = folder.parent.parent
    assert checkpoint.newest(output) is None
    for step in (3, 999_999, 1_000_000):
        checkpoint.write(folder.with_name(f"step_{step:06d}"), STATE, *small())
    assert [path.name for path in checkpoint.finished(output)] == ["step_999999", "step_1000000"]
    (folder.parent / "step_1000001.tmp").mkdir()
    shutil.copytree(folder.with_name("step_999999"), folder.with_name("step_999999_good"))
    assert checkpoint.newest(output).name == "step_1000000"
    checkpoint.write(folder.with_name("step_1000002"), STATE, *small())
    left = {path.name for path in folder.parent.iterdir()}
    assert left == {"step_1000000", "step_1000002", "step_999999_good"}


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip(path):
    """Another bit of a weight: the file is as readable as before."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", [cut, flip, lambda path: path.unlink()])
def test_what_is_not_as_it_was_written_is_refused(folder, change):
    checkpoint.write(folder, STATE, *small(1))
    change(next(folder.glob("*.safetensors")))
    with pytest.raises(ValueError, match="_000003: .*safetensors is not as it was written; delete"):
        checkpoint.restore(folder, *small())


def test_a_checkpoint_of_another_model_is_refused(folder):
    checkpoint.write(folder, STATE, *small(1))
    with pytest.raises(ValueError, match="_000003: does not fit --model or is damaged .*; give the"):
        checkpoint.restore(folder, *small(hidden=6))


@pytest.mark.parametrize("text", [
    "{", "[]", "3", '"x"', "{}", {"step": "3"}, {"step": 3.0}, {"step": True}, {"bad_steps": None},
    {"bad_in_a_row": "x"}, {"files": []}, {"config": [1]}, {"crc32": 3}])
def test_a_state_of_another_shape_is_one_line(folder, text):
    checkpoint.write(folder, STATE, *small())
    path = folder / "state.json"
    state = checkpoint.read_state(path)
    assert {name: state[name] for name in STATE} == STATE
    path.write_text(text if isinstance(text, str) else json.dumps(state | text))
    with pytest.raises(ValueError, match="_000003: its state.json cannot be used .*; delete the"):
        checkpoint.read_state(path)


def test_a_full_disk_leaves_the_last_checkpoint_whole(folder):
    checkpoint.write(folder, STATE, *small())
    error = f"step_000004: could not be written .*File too large.*--resume from {folder}$"
    with full_disk(10_000), pytest.raises(OSError, match=error):
        checkpoint.write(folder.with_name("step_000004"), STATE, *small(hidden=5000))
    assert list(folder.parent.iterdir()) == [folder]
    checkpoint.restore(folder, *small())


def write_and_read(folder):
    """In each of two processes: write a checkpoint, and read the one that one process wrote."""
    checkpoint.write(folder.with_name("step_000004"), STATE, *small(3))
    other = small(seed=1)
    checkpoint.restore(folder, *other)
    return tensors(*other)


@pytest.mark.processes
def test_any_number_of_processes_reads_what_any_number_wrote(folder, tmp_path):
    one = small(3)
    checkpoint.write(folder, STATE, *one)
    read_by_two = together(tmp_path / "job", 2, 2, write_and_read, folder)
    other = small(seed=1)
    checkpoint.restore(folder.with_name("step_000004"), *other)
    for read in (*read_by_two, tensors(*other)):
        torch.testing.assert_close(read, tensors(*one), rtol=0, atol=1e-6)


# Evaluations

def save_as(text):
    def save(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "model").write_text(text)
    return save


def test_an_evaluation_is_due_first_and_last_at_least(tmp_path):
    kept = Evaluations(tmp_path, 0, every=0, steps=5)
    assert [step for step in range(7) if kept.due(step)] == [0, 5]


def test_best_is_the_earliest_of_the_highest(tmp_path):
    """Also when better ones of a branch that was left are taken out of the log."""
    kept = Evaluations(tmp_path, 0, every=2, steps=5)
    assert [step for step in range(7) if kept.due(step)] == [0, 2, 4, 5, 6]
    for step, score in ((0, 0.5), (2, 0.7), (4, 0.7), (5, 0.6)):
        kept.add({"step": step, "mIoU": score}, save_as(f"of step {step}"))
        assert not kept.due(step)
    best = tmp_path / "best" / "model"
    assert best.read_text() == "of step 2"
    assert read_rows(tmp_path / "best" / "evaluation.jsonl") == [{"step": 2, "mIoU": 0.7}]
    assert [row["step"] for row in read_rows(tmp_path / "evaluations.jsonl")] == [0, 2, 4, 5]

    again = Evaluations(tmp_path, 1, every=0, steps=5)      # from a checkpoint after one step
    assert [row["step"] for row in read_rows(tmp_path / "evaluations.jsonl")] == [0]
    assert [step for step in range(7) if again.due(step)] == [5]
    again.add({"step": 5, "mIoU": 0.65}, save_as("worse"))
    assert best.read_text() == "of step 2"


@pytest.mark.parametrize("left", ["best.new", "best.old"])
def test_a_kill_between_two_names_loses_nothing(tmp_path, left):
    Evaluations(tmp_path, 0, 1, 1).add({"step": 0, "mIoU": 0.5}, save_as("kept"))
    (tmp_path / "best").rename(tmp_path / left)
    (tmp_path / "best.new").mkdir(exist_ok=True)        # half of it: without its line
    assert Evaluations(tmp_path, 0, 1, 1).best == 0.5
    assert (tmp_path / "best" / "model").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "evaluations.jsonl"]


def test_an_evaluation_is_one_short_line(tmp_path, capsys):
    row = {"step": 3, "mIoU": 0.512, "R1@0.5": 0.25, "R1>0.5": 0.2, "mIoU_95": [0.1, 0.2],
           "note": "few", "VC": 1.0}
    Evaluations(tmp_path, 0, 1, 1).add(row, save_as(""))
    line = "after 3 steps, held out: mIoU 0.512  R1@0.5 0.25  VC 1, the best so far\n"
    assert capsys.readouterr().out == line
    assert read_rows(tmp_path / "evaluations.jsonl") == [row]
