"""Paired differences of two evaluations by hand."""
import json

import pytest

from lab import compare


def evaluation(folder, ious, vc):
    """Two queries of disjoint events a video; the answers of each have these IoUs with their own truths."""
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
    mixed = evaluation(tmp_path / "c", [1.0, 0.0] * 20, [0.0, 1.0] * 10)
    low, high = compare.compare(mixed, b)["vc"][3:]
    assert 0.2 < low < 0.5 < high < 0.8


def test_command_line(tmp_path, capsys):
    a = evaluation(tmp_path / "a", [1.0, 0.8] * 3, [1.0] * 3)
    b = evaluation(tmp_path / "b", [0.5, 0.6] * 3, [0.0] * 3)
    assert compare.main([a, b, b, a]) == 0
    out = capsys.readouterr().out
    assert "iou              0.900 - 0.550 = +0.350 (+0.350 to +0.350)" in out and "mean +0.000, from -0.350" in out
    for words, said in (([a], "give pairs"), ([a, str(tmp_path)], "has no predictions.jsonl")):
        assert compare.main(words) == 2
        assert said in capsys.readouterr().err
