"""Checkpoints: to the bit, whole or not at all, for any number of processes, and only for the run that wrote them."""
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
import torch.distributed as dist
from conftest import FORKS, finish
from torch import nn
from torch.distributed.fsdp import fully_shard

import sft
import train
from engine import checkpoint, files


def small(steps=0, seed=0, hidden=5):
    """A model, its second layer with fewer rows than there are processes, its third frozen, and its optimizer."""
    torch.manual_seed(seed)
    policy = nn.Sequential(nn.Linear(3, hidden), nn.Linear(hidden, 1), nn.Linear(1, 2).requires_grad_(False))
    if dist.is_initialized():
        fully_shard(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    for step in range(steps):
        policy(torch.ones(2, 3) + step).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy, optimizer


def whole(policy, optimizer):
    return {name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
            for name, value in checkpoint.tensors(policy, optimizer).items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints" / "step_000003"


@pytest.mark.parametrize("steps", [0, 3])
def test_all_comes_back_to_the_bit(folder, steps):
    one = small(steps)
    checkpoint.write(folder, {"step": steps}, *one, keep=1)
    other = small(seed=1)
    checkpoint.restore(folder, *other)
    assert equal(whole(*one), whole(*other)) and len(whole(*one)) == (6 if steps == 0 else 6 + 4 * 3)
    for policy, optimizer in (one, other):                  # and goes on alike
        policy(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert equal(whole(*one), whole(*other))


def test_nothing_is_pickled(folder, monkeypatch):
    for owner, name in ((pickle, "dump"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "save"),
                        (torch, "load")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("a pickle"))
    checkpoint.write(folder, {"step": 3}, *small(3), keep=1)
    checkpoint.restore(folder, *small())
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_newest_and_kept(folder):
    policy, optimizer = small(1)
    for step in (999_999, 1_000_000):
        checkpoint.write(folder.with_name(f"step_{step:06d}"), {"step": step}, policy, optimizer, keep=9)
    assert checkpoint.newest(folder.parent.parent).name == "step_1000000"
    checkpoint.write(folder.with_name("step_1000001"), {"step": 1_000_001}, policy, optimizer, keep=2)
    (folder.parent / "step_1000002.tmp").mkdir()
    assert {path.name for path in folder.parent.iterdir()} == {"step_1000000", "step_1000001", "step_1000002.tmp"}
    assert checkpoint.newest(folder.parent.parent).name == "step_1000001"
    assert checkpoint.newest(folder) is None
    checkpoint.write(folder.with_name("step_1000003"), {}, policy, optimizer, keep=9)
    assert not (folder.parent / "step_1000002.tmp").exists()


def damage(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])


def lose(folder):
    next(folder.glob("*.safetensors")).unlink()


def flip(folder):
    """One bit of a weight: the file is as readable as before."""
    path = next(folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", [damage, lose, flip])
def test_what_is_not_as_it_was_written_is_refused(folder, change):
    checkpoint.write(folder, {}, *small(1), keep=1)
    change(folder)
    with pytest.raises(ValueError, match="step_000003: .*safetensors is not as it was written; delete the folder"):
        checkpoint.restore(folder, *small())


def test_of_another_model(folder):
    checkpoint.write(folder, {}, *small(1), keep=1)
    with pytest.raises(ValueError, match="step_000003: does not fit --model or is damaged .*; give the model"):
        checkpoint.restore(folder, *small(hidden=6))


def two_ranks(rank, folder):
    """Write a checkpoint with two processes, and read the one that one process wrote."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    checkpoint.write(folder / "checkpoints" / "step_000004", {}, *small(3), keep=9)
    other = small(seed=1)
    checkpoint.restore(folder / "checkpoints" / "step_000003", *other)
    torch.save(whole(*other), folder / f"read_by_{rank}")
    dist.destroy_process_group()


@pytest.mark.processes
def test_any_number_of_processes(folder, tmp_path):
    checkpoint.write(folder, {}, *small(3), keep=9)
    started = [FORKS.Process(target=two_ranks, args=(rank, tmp_path)) for rank in range(2)]
    for process in started:
        process.start()
    assert finish(started) == [0, 0]
    one = small(seed=1)
    checkpoint.restore(tmp_path / "checkpoints" / "step_000004", *one)
    expected = whole(*small(3))
    for found in (whole(*one), *(torch.load(tmp_path / f"read_by_{rank}", weights_only=True) for rank in range(2))):
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "train.txt").write_text("A 0.0 1.0##a person sits.\n")
    return train.Config(model=str(tmp_path / "model"), annotations=str(tmp_path / "train.txt"), videos="videos",
                        output=str(tmp_path / "run"))


def test_a_folder_in_use_is_refused_before_anything_is_loaded(config, tmp_path):
    checkpoint.Run(config)                                              # there is none yet
    (tmp_path / "run").mkdir()
    checkpoint.Run(config)                                              # it is empty
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="--output .*run is not empty; give --resume"):
        checkpoint.Run(config)
    with pytest.raises(ValueError, match="--output .*train.txt is not empty"):
        checkpoint.Run(replace(config, output=config.annotations))
    assert checkpoint.Run(replace(config, resume=True)).step == 0       # where no checkpoint is, --resume begins


def save(config):
    state = {"step": 3, "bad_steps": 1, "bad_in_a_row": [], "files": checkpoint.Run(config).files,
             "config": vars(config)}
    checkpoint.write(Path(config.output) / "checkpoints" / "step_000003", state, *small(), keep=1)


@pytest.mark.parametrize("flags, words", [
    ({"seed": 5}, "--seed 5: .*step_000003 was made with 0;"), ({"group_size": 4}, "--group_size 4: .* made with 8"),
    ({"tasks": ["VC"]}, r"--tasks \['VC'\]: .* made with"), ({"model": "other"}, "--model other: .* made with ")])
def test_only_the_same_run_goes_on(config, flags, words):
    save(config)
    with pytest.raises(ValueError, match=words):
        checkpoint.Run(replace(config, resume=True, **flags))


def test_another_script_or_a_finished_run_is_refused(config, tmp_path):
    """Also before the first checkpoint, and when somebody has deleted the checkpoints."""
    other = sft.Config(config.model, config.annotations, config.videos, config.output, resume=True)
    run = tmp_path / "run"
    run.mkdir()
    files.write_config(config, run)
    with pytest.raises(ValueError, match="--seed 5: .*run was made with 0"):
        checkpoint.Run(replace(config, resume=True, seed=5))
    with pytest.raises(ValueError, match="run was made by another script.*--batch_size"):
        checkpoint.Run(other)
    assert checkpoint.Run(replace(config, resume=True)).step == 0
    (run / "model").mkdir()
    with pytest.raises(ValueError, match="run holds a finished run without a checkpoint"):
        checkpoint.Run(replace(config, resume=True))
    (run / "config.json").unlink(), (run / "model").rmdir(), run.rmdir()
    save(config)
    with pytest.raises(ValueError, match="step_000003 was made by another script.*--batch_size"):
        checkpoint.Run(other)


def test_a_copy_of_a_checkpoint_is_left_alone(config, tmp_path):
    save(config)
    shutil.copytree(checkpoint.newest(config.output), tmp_path / "run" / "checkpoints" / "step_000003_good")
    run = checkpoint.Run(replace(config, resume=True, keep=1, save_every=1))
    run.finish(3, *small(), Event())
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_000003_good",
                                                                                          "step_000004"]


def test_a_stop_after_a_bad_step_is_resumed_as_it_was(config):
    run, stop = checkpoint.Run(replace(config, save_every=1)), Event()
    run.count(0, {"loss": float("nan")})
    run.finish(0, *small(), stop)
    assert checkpoint.newest(config.output) is None                     # none on the way through bad steps
    stop.set()
    assert run.finish(1, *small(), stop) and checkpoint.newest(config.output).name == "step_000002"
    again = checkpoint.Run(replace(config, save_every=1, resume=True))
    assert (again.step, again.bad_steps, again.bad_in_a_row) == (2, 1, ["loss in step 0"])


def test_what_may_change_is_said(config, tmp_path):
    save(config)
    run = checkpoint.Run(replace(config, resume=True))
    assert (run.step, run.bad_steps, run.notes) == (3, 1, [])
    (tmp_path / "train.txt").write_text("")
    notes = checkpoint.Run(replace(config, resume=True, learning_rate=1e-7, steps=9)).notes
    assert [note.split()[0] for note in notes] == ["--steps", "--learning_rate", "train.txt"] and "1e-07" in notes[1]


@pytest.mark.parametrize("text", [
    "{", "[]", "null", "3", '"x"', "{}", {"step": -1}, {"step": "3"}, {"step": 3.0}, {"step": True},
    {"bad_steps": None},
    {"bad_in_a_row": "x"}, {"bad_in_a_row": [1]}, {"files": []}, {"config": [1]}, {"crc32": 3}])
def test_a_state_of_another_shape_is_one_line_and_nothing_is_emptied(config, tmp_path, text):
    save(config)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    path = tmp_path / "run" / "checkpoints" / "step_000003" / "state.json"
    path.write_text(text if isinstance(text, str) else json.dumps({**json.loads(path.read_text()), **text}))
    with pytest.raises(ValueError, match="step_000003: its state.json cannot be used .*; delete the folder"):
        checkpoint.Run(replace(config, resume=True))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 0}\n'


@pytest.mark.parametrize("text", ["{", "[1]", "null", "3", '"x"'])
def test_a_config_of_another_shape_is_one_line(config, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json: is not the config of a run .*; give another folder"):
        checkpoint.Run(replace(config, resume=True))


def test_all_stop_when_one_is_asked_to(config, monkeypatch):
    run, others = checkpoint.Run(config), [False]
    monkeypatch.setattr(checkpoint.launch, "gather", lambda mine: mine + others * (mine in ([True], [False])))
    assert not run.finish(0, *small(), Event()) and checkpoint.newest(config.output) is None
    others[0] = True                                                    # another process got the signal
    assert run.finish(1, *small(), Event()) and checkpoint.newest(config.output).name == "step_000002"


@pytest.mark.parametrize("flags", [{"save_every": -1}, {"keep": 0}, {"max_bad_steps": 0}])
def test_wrong_flags_are_named(config, flags):
    with pytest.raises(ValueError, match=f"--{next(iter(flags))} "):
        checkpoint.Run(replace(config, **flags))


@pytest.mark.parametrize("step, kept", [(0, 0), (2, 2), (3, 3), (9, 3)])
def test_logs_lose_what_will_be_written_again(tmp_path, step, kept):
    rows = [json.dumps({"step": i}) + "\n" for i in range(3)]
    (tmp_path / "log").write_text("".join(rows) + '{"step": 3, "los')
    checkpoint.rewind(tmp_path / "log", step)
    assert (tmp_path / "log").read_text() == "".join(rows[:kept])
    (tmp_path / "log").write_bytes(rows[0].encode() + b"\0\0\xff\n" + rows[1].encode())     # after a power cut
    checkpoint.rewind(tmp_path / "log", step)
    assert (tmp_path / "log").read_text() == "".join(rows[:min(kept, 1)])
    checkpoint.rewind(tmp_path / "none", step)
    assert (tmp_path / "none").read_text() == ""


def test_missing_lines_of_a_log_are_named(tmp_path, capsys):
    (tmp_path / "log").write_text('{"step": 0}\n{"step": 1}\n')
    checkpoint.rewind(tmp_path / "log", 2)
    assert capsys.readouterr().out == ""
    checkpoint.rewind(tmp_path / "log", 5)
    assert "log: has no lines of steps 2 to 4" in capsys.readouterr().out
