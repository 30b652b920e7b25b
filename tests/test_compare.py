"""Paired differences of two evaluations by hand."""
import json

import pytest

from engine import flags
from lab import compare


def evaluation(folder, ious, vc):
    """Two queries of disjoint events per video; the answers have these IoUs with their own truths."""
    folder.mkdir()
    rows = []
    for i, iou in enumerate(ious):
        truth = [10 * (i % 2), 10 * (i % 2) + 10]
        rows.append({"id": f"v{i // 2}:{i}", "task": "TVG", "video": f"{folder}/v{i // 2}.mp4", "query": f"q{i % 2}",
                     "start": truth[0], "end": truth[0] + 10 * iou, "truth": truth, "iou": iou, "format": 1.0})
    rows += [{"id": f"v{i}:0", "task": "VC", "video": f"{folder}/v{i}.mp4", "query": "q", "format": 1.0, "vc": value}
             for i, value in enumerate(vc)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_differences_by_hand(tmp_path):
    a = evaluation(tmp_path / "a", [1.0, 0.8] * 20, [1.0] * 20)
    b = evaluation(tmp_path / "b", [0.5, 0.6] * 20, [0.0] * 20)
    found = compare.compare(a, b)
    assert found["iou"] == pytest.approx((0.9, 0.55, 0.35, 0.35, 0.35))
    assert found["R1@0.7"] == pytest.approx((1, 0, 1, 1, 1)) and found["R1@0.3"][2] == 0
    assert found["vc"][:3] == (1, 0, 1) and found["format VC"][2] == 0
    assert found["right_event"][:3] == (1, 1, 0) and found["same_answer"][:3] == (0, 0, 0)
    mixed = evaluation(tmp_path / "c", [0.0, 0.0], [0.0, 1.0] * 10)
    low, high = compare.compare(mixed, b)["vc"][3:]
    assert 0.2 < low < 0.5 < high < 0.8


def test_queries_are_paired_by_id(tmp_path):
    """Whatever their order; those that one folder lacks are left out. Of toy.py there is narrated.jsonl, too."""
    a = evaluation(tmp_path / "a", [1.0, 0.8, 0.6, 0.4], [1.0])
    b = evaluation(tmp_path / "b", [1.0, 0.8, 0.6, 0.4, 0.0, 0.0], [1.0])
    lines = (tmp_path / "b" / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b" / "predictions.jsonl").write_text("".join(reversed(lines)))
    for folder, value in ((tmp_path / "a", 0.5), (tmp_path / "b", 0.25)):
        rows = [{"id": f"v{i}:0", "video": f"v{i}", "narrated": value} for i in range(3)]
        (folder / "narrated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare.compare(a, b)
    assert found["iou"] == pytest.approx((0.7, 0.7, 0, 0, 0)) and found["narrated"][2] == 0.25
    assert "vc" not in found        # of one video there is no interval


def test_command_line(tmp_path, monkeypatch, capsys):
    a = evaluation(tmp_path / "a", [1.0, 0.8] * 3, [1.0] * 3)
    b = evaluation(tmp_path / "b", [0.5, 0.6] * 3, [0.0] * 3)
    monkeypatch.setattr("sys.argv", ["compare.py", a, b, b, a])
    flags.command_line(compare.Config, compare.main, compare.__doc__)
    out = capsys.readouterr().out
    assert "iou              0.900 - 0.550 = +0.350 (+0.350 to +0.350)" in out and "mean +0.000, from -0.350" in out
    for folders, words in (([a], "give pairs"), ([a, str(tmp_path)], "has no predictions.jsonl")):
        with pytest.raises(ValueError, match=words):
            compare.main(compare.Config(folders=folders))
