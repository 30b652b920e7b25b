"""video_folder.py: which file an annotation means."""
import os

import pytest

from engine.video_folder import finder

FILES = ["videos/a.mkv", "videos/a.mp4", "videos/b.mkv", "videos/sub/b.mkv", "videos/sub/a.mp4",
         "videos/sub/v_1.5_2.0.webm", "videos/sub/deep/deep.MOV", "videos/notes.txt",
         "videos/.cache/hidden.mp4", "secret.mp4", "elsewhere/linked.mp4", "elsewhere/a.mp4"]


@pytest.mark.parametrize("video, expected", [
    ("a", "a.mp4"),                             # of two extensions, the preferred one
    ("a.avi", "a.mp4"), ("b", "b.mkv"),         # of two folders, the upper one
    ("v_1.5_2.0", "sub/v_1.5_2.0.webm"),        # .0 is no extension
    ("sub/b.mkv", "sub/b.mkv"), ("sub/b", "sub/b.mkv"),
    ("./data/sub/b.mkv", "sub/b.mkv"), ("/data/sub/b.mkv", "sub/b.mkv"),      # ends of a path
    ("../sub/b.mkv", "sub/b.mkv"),
    ("./data/videos/deep.mp4", "sub/deep/deep.MOV"),
    ("loop/a.avi", "a.mp4"), ("linked", "link/linked.mp4"),                    # links
    ("../secret.mp4", "../secret.mp4"), ("sub/../a.mp4", "sub/../a.mp4"),      # the very file
    ("{outside}/elsewhere/a.mp4", "{outside}/elsewhere/a.mp4"),
    ("/elsewhere/a.mp4", "a.mp4"),              # there is no such file
    ("A", "A.mp4"), ("hidden", "hidden.mp4"), ("x/gone.mkv", "gone.mkv"), ("../secret", "secret.mp4")])
def test_which_file_is_meant(tmp_path, video, expected):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folder = tmp_path / "videos"
    os.symlink(folder, folder / "loop")
    os.symlink(tmp_path / "elsewhere", folder / "link")
    path = finder(str(folder))(video.format(outside=tmp_path))
    assert path == os.path.join(folder, expected.format(outside=tmp_path))
