"""Reading Charades-STA text, and the endless stream of samples."""
import pytest

import data
from video import VideoError


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("AO8RW.mp4", "00607.mkv", "21E40.MP4"):
        (folder / name).write_bytes(b"x")
    return folder


def test_reads_what_is_usable_and_names_what_is_not(tmp_path, videos):
    path = tmp_path / "train.txt"
    path.write_text("AO8RW 0.0 6.9##a person is putting a book on a shelf.\n"
                    "00607 24 30.5##  turn #1   on   \r\n"
                    "\n"
                    "IOL8Q 20.9 12.0##person opens a door.\n"
                    "21E40 3.0 3.0##person sits.\n"
                    "21E40 -1.0 3.0##person sits.\n"
                    "21E40 nan 3.0##person sits.\n"
                    "21E40 1.0 inf##person sits.\n"
                    "21E40 1.0 2.0##\n"
                    "no segment here\n"
                    "50E06 1.0 2.0##person l\u00e4uft.", encoding="utf-8")
    samples, rejected = data.read(str(path), str(videos))
    assert [(s.id, s.query, s.start, s.end) for s in samples] == [
        ("AO8RW:1", "a person is putting a book on a shelf.", 0.0, 6.9), ("00607:2", "turn #1 on", 24.0, 30.5),
        ("50E06:11", "person l\u00e4uft.", 1.0, 2.0)]
    assert [s.video for s in samples] == [str(videos / "AO8RW.mp4"), str(videos / "00607.mkv"), str(videos / "50E06.mp4")]
    assert [r.place.rsplit(":")[-1] for r in rejected] == ["4", "5", "6", "7", "8", "9", "10"]
    assert "20.9" in rejected[0].reason and "sentence" in rejected[5].reason and "form" in rejected[6].reason


@pytest.mark.parametrize("content", [b"", b"hello\n", b"a 3 1##x\n", b"\xff\xfe\x00"])
def test_unusable_file_is_one_clear_error(tmp_path, videos, content):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(data.AnnotationError, match="bad.txt"):
        data.read(str(tmp_path / "bad.txt"), str(videos))


def test_missing_paths(tmp_path, videos):
    with pytest.raises(data.AnnotationError, match="none.txt.*--annotations"):
        data.read(str(tmp_path / "none.txt"), str(videos))
    (tmp_path / "ok.txt").write_text("AO8RW 0 1##x\n")
    for folder in ("none", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(data.AnnotationError, match=f"{folder}.*--videos"):
            data.read(str(tmp_path / "ok.txt"), str(tmp_path / folder))


def test_every_epoch_is_a_new_order_of_all_samples():
    stream = [data.pick(list(range(10)), i, 5, lambda s: -s) for i in range(30)]
    epochs = [[s for s, *_ in stream[i:i + 10]] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert all(made == -s and not errors for s, made, errors in stream)
    assert data.pick(list(range(10)), 17, 5, str)[0] == stream[17][0]


def test_unreadable_video_is_replaced_and_named():
    def make(sample):
        if sample < 5:
            raise VideoError(f"{sample}: broken")
        return sample

    picked = [data.pick(list(range(10)), i, 0, make) for i in range(10)]
    assert all(sample >= 5 for sample, *_ in picked)
    assert {str(errors[0]) for *_, errors in picked if errors} == {f"{i}: broken" for i in range(5)}
    assert [p[:2] for p in picked] == [data.pick(list(range(10)), i, 0, make)[:2] for i in range(10)]
    with pytest.raises(VideoError, match="broken"):
        data.pick([1, 2, 3], 0, 0, make)
