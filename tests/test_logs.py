"""Files, console and TensorBoard of a run."""
import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import files, logs

KEYS = ("lr", "kl", "loss", "clipped", "mismatch", "grad_norm", "updates", "bad_steps")


def numbers(step, task="VC", **changes):
    part = {"TVG": "iou", "VC": "vc"}[task]
    return {"step": step, "task": task, "part": part, "reward": 1.125, "format": 0.875, part: 0.25, "tokens": 41.2,
            "flat": 0.5, **dict.fromkeys(KEYS, 0.0031), **changes}


def rows(bad=()):
    return [{"completion": "x", "tokens": 4, "bad_videos": list(bad) if i == 0 else []} for i in range(4)]


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(launch, "say", lines.append)
    return lines


def test_a_step_is_one_short_line(tmp_path, said):
    log = logs.Logs(tmp_path, 0, 2, 0)
    log.step(numbers(12), rows(), 8.0)
    log.step(numbers(13, kl=None), rows(), 8.0)
    assert said == ["step 12  VC   reward 1.12 = format 0.875 + vc 0.25  kl 0.0031  tokens 41.2  seconds 8",
                    "step 13  VC   reward 1.12 = format 0.875 + vc 0.25  kl -  tokens 41.2  seconds 8"]
    assert max(map(len, said)) < 100
    first, _ = map(json.loads, open(tmp_path / "metrics.jsonl"))
    assert first == {**numbers(12), "bad_videos": 0, "seconds": 8.0, "tokens_per_second": 2.0}
    samples = [json.loads(line) for line in open(tmp_path / "samples.jsonl")]
    assert len(samples) == 4 and samples[0] == {"step": 12, "task": "VC", "completion": "x", "tokens": 4}
    assert not (tmp_path / "tensorboard").exists()
    other = logs.Logs(tmp_path / "other", 1, 2, 0, tensorboard=True)        # of another process
    other.step(numbers(0), rows(), 8.0)
    assert not (tmp_path / "other").exists() and len(said) == 2


def test_what_went_wrong_is_said_once(tmp_path, said):
    log = logs.Logs(tmp_path, 0, 2, 0)
    log.step(numbers(0, loss=float("nan"), updates=0), rows(["a.mp4: torn"]), 1.0)
    log.step(numbers(1, loss=float("inf"), updates=2), rows(["a.mp4: torn", "b.mp4: gone"]), 1.0)
    assert [line for line in said if not line.startswith(("step 0  ", "step 1  "))] == [
        "step 0 changes nothing: loss not finite", "replaced by another sample: a.mp4: torn",
        "step 1 stops after 2 update(s): loss not finite", "replaced by another sample: b.mp4: gone"]
    assert json.loads(open(tmp_path / "metrics.jsonl").readline())["loss"] is None


def scalars(folder):
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, round(event.value, 4)) for event in board.Scalars(tag)]
            for tag in board.Tags()["scalars"]}


def test_tensorboard_has_the_numbers_of_the_files_once(tmp_path, said):
    log = logs.Logs(tmp_path, 0, 2, 0, tensorboard=True)
    for step, task in enumerate(("TVG", "VC", "TVG")):
        log.step(numbers(step, task, reward=step / 2, kl=None if step == 1 else 0.5), rows(), 4.0)
    log.evaluation({"step": 2, "mIoU": 0.25, "mIoU_95": [0.1, 0.3]})
    files.append(tmp_path / "evaluations.jsonl", [{"step": 2, "mIoU": 0.25, "mIoU_95": [0.1, 0.3]}])
    found = scalars(tmp_path)
    assert found["TVG/reward"] == [(0, 0.0), (2, 1.0)] and found["VC/reward"] == [(1, 0.5)]
    assert found["VC/vc"] == [(1, 0.25)] and found["step/kl"] == [(0, 0.5), (2, 0.5)]
    assert found["step/seconds"] == [(0, 4.0), (1, 4.0), (2, 4.0)] and found["held_out/mIoU"] == [(2, 0.25)]
    assert len(found) == 2 * 5 + 3 + len(KEYS) + 1

    log = logs.Logs(tmp_path, 0, 2, 2, tensorboard=True)       # a run that goes on from step 2
    log.step(numbers(2, "TVG", reward=0.75), rows(), 4.0)
    found = scalars(tmp_path)
    assert found["TVG/reward"] == [(0, 0.0), (2, 0.75)] and found["held_out/mIoU"] == [(2, 0.25)]


def test_where_it_is_missing_one_line_tells_how_to_get_it(monkeypatch):
    logs.check_board()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="--tensorboard .*pip install tensorboard$"):
        logs.check_board()
