import os

import pytest

from engine import video_folder


@pytest.mark.parametrize("video, expected", [
    ("a", "a.mp4"), ("a.mp4", "a.mp4"), ("a.avi", "a.mp4"), ("A", "A.mp4"), ("v_1.5_2.0", "sub/v_1.5_2.0.webm"),
    ("sub/b.mkv", "sub/b.mkv"), ("b.mkv", "b.mkv"), ("sub/b", "sub/b.mkv"), ("./data/sub/b.mkv", "sub/b.mkv"),
    ("./data/videos/deep.mp4", "sub/deep/deep.MOV"), ("/data/sub/b.mkv", "b.mkv"), ("../secret.mp4", "secret.mp4"),
    ("sub/../../secret", "secret.mp4"), ("../sub/b.mkv", "b.mkv"), ("hidden", "hidden.mp4"), ("gone", "gone.mp4"),
    ("x/gone.mkv", "gone.mkv"), ("loop/a.mp4", "a.mp4"), ("linked", "link/linked.mp4")])
def test_finds_videos_inside_the_folder_only(tmp_path, video, expected):
    folder = tmp_path / "videos"
    for name in ("a.mkv", "a.mp4", "b.mkv", "sub/b.mkv", "sub/a.mp4", "sub/v_1.5_2.0.webm", "sub/deep/deep.MOV",
                 "notes.txt",
                 ".cache/hidden.mp4", "../secret.mp4", "../elsewhere/linked.mp4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    os.symlink(folder, folder / "loop")
    os.symlink(tmp_path / "elsewhere", folder / "link")
    assert video_folder.finder(str(folder))(video) == str(folder / expected)
