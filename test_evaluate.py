"""Scores by hand, and the evaluation of a tiny model on real files, broken ones among them."""
import json
from pathlib import Path

import pytest

import evaluate


def row(task, **parts):
    return {"task": task, "format": 1.0, "start": 0.0, **parts}


def test_scores_by_hand():
    rows = [row("TVG", iou=0.5), row("TVG", iou=0.69), row("TVG", iou=1.0), row("TVG", iou=0.0, start=None, format=0.0),
            row("VC", vc=1.0), row("VC", vc=0.0), row("AR", ar=1.0), row("VD", vd=0.0, error="x: broken")]
    scores = evaluate.summarise(rows)
    assert scores["mIoU"] == pytest.approx((0.5 + 0.69 + 1.0) / 4) and scores["queries"] == 4
    assert [scores[f"R1@{m}"] for m in (0.3, 0.5, 0.7)] == [0.75, 0.75, 0.25]        # at the threshold counts
    assert [scores[name] for name in ("VC", "AR", "VD")] == [0.5, 1.0, 0.0]
    assert scores["unparsable"] == 1 and scores["unreadable"] == 1 and scores["format"] == pytest.approx(7 / 8)


def test_gain_and_its_interval():
    rows = lambda ious: [{"id": str(i), "video": str(i // 2), "iou": iou} for i, iou in enumerate(ious)]
    assert evaluate.gain(rows([0.1] * 40), rows([0.3] * 40)) == pytest.approx((0.2, 0.2, 0.2))
    mean, low, high = evaluate.gain(rows([0.5] * 400), rows([0.4, 0.4, 0.8, 0.8] * 100))
    assert mean == pytest.approx(0.1) and 0.06 < low < 0.09 and 0.11 < high < 0.14      # 0.2 / sqrt(200) * 1.96


def config(folder, output, **flags):
    return evaluate.Config(model=str(folder / "model"), annotations=str(folder / "test.txt"),
                           videos=str(folder / "videos"), output=str(output), max_tokens=10, **flags)


def predictions(folder):
    return {(r["id"], r["task"]): r for r in map(json.loads, open(folder / "predictions.jsonl"))}


def test_broken_and_missing_videos_stay_in_the_denominator(folder, tmp_path):
    files = tmp_path / "videos"
    files.mkdir()
    names = sorted(p for p in (folder / "videos").iterdir() if p.name.startswith("test"))
    for path in names[2:]:
        (files / path.name).symlink_to(path)
    (files / names[0].name).write_bytes(b"")                                # one is empty, one is missing
    lines = (folder / "test.txt").read_text().splitlines()
    lost = sum(line.split()[0] in (names[0].stem, names[1].stem) for line in lines)
    settings = config(folder, tmp_path / "out", tasks=["TVG", "AR"], batch_size=3)
    settings.videos = str(files)
    scores = evaluate.main(settings)
    assert scores["queries"] == len(lines) and scores["unreadable"] == 2 * lost > 0
    errors = [r for r in predictions(tmp_path / "out").values() if "error" in r]
    assert len(errors) == 2 * lost and all(r["video"] in r["error"] and r["format"] == 0 for r in errors)
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == scores


def test_batches_do_not_change_answers_and_blind_does(folder, tmp_path):
    for name, flags in (("one", dict(batch_size=1)), ("many", dict(batch_size=5)), ("blind", dict(blind=True))):
        evaluate.main(config(folder, tmp_path / name, tasks=["TVG", "VC"], **flags))
    one, many, blind = ({k: r["completion"] for k, r in predictions(tmp_path / n).items()} for n in ("one", "many", "blind"))
    assert one == many and one.keys() == blind.keys() and one != blind


def test_unknown_task_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="--tasks XX"):
        evaluate.main(config(folder, tmp_path / "out", tasks=["XX"]))
    assert not Path(tmp_path / "out").exists()
