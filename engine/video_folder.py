"""Where the video of an annotation is: at the annotated path, if there is such a file, or else somewhere in the folder
of the videos or in its subfolders, by id with any usual extension, by the annotated path, or by ever shorter ends of
that path, down to the bare name. Links are followed.

    find = finder("videos")
    find("AO8RW")                       # videos/AO8RW.mp4
    find("./data/charades/AO8RW.mkv")   # videos/charades/AO8RW.mkv if there is one, else videos/AO8RW.mp4
"""
import os
from collections.abc import Callable
from pathlib import PurePosixPath

# preferred ones first
EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv")


def stem(name: str) -> str:
    """'sub/x.mp4' -> 'sub/x', but 'x_510.0' as it is."""
    extension = os.path.splitext(name)[1]
    if extension.lower() in EXTENSIONS:
        return name[:-len(extension)]
    return name


def bare(path: str) -> str:
    """'./videos/x.mp4' -> 'x'"""
    return stem(PurePosixPath(path).name)


def list_videos(folder: str) -> list[str]:
    """The paths, from `folder` on, of the video files in it and in its subfolders, but for hidden ones.

    Raises ValueError when the folder cannot be listed or holds no video.
    """
    advice = "give --videos the folder of the videos"
    try:
        os.scandir(folder).close()      # os.walk says nothing when it cannot list
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed ({error}); {advice}") from error
    paths = []
    visited = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:     # data sets are often linked together, maybe in a circle
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if stem(name) != name and not name.startswith("."):
                paths.append(os.path.relpath(os.path.join(root, name), folder))
    if not paths:
        raise ValueError(f"{folder}: no video files ({', '.join(EXTENSIONS)}); {advice}")
    return paths


def preference(path: str) -> tuple[int, int, str]:
    """Sorts first, of two files of one name, the one in the upper folder, then that of the preferred extension."""
    extension = os.path.splitext(path)[1].lower()
    return path.count("/"), EXTENSIONS.index(extension), path


def finder(folder: str) -> Callable[[str], str]:
    """find(video), of an id or an annotated path, is the path of its file, or else where that was expected.

    Raises ValueError when the folder cannot be listed or holds no video.
    """
    files = {}      # name, with or without folders and extension -> path of the preferred file
    for path in sorted(list_videos(folder), key=preference):
        for name in (path, stem(path), os.path.basename(path), bare(path)):
            files.setdefault(name, os.path.join(folder, path))

    def find(video: str) -> str:
        annotated = os.path.join(folder, video)     # `video` itself, if that is absolute
        if os.path.isfile(annotated):
            return annotated
        parts = PurePosixPath(video).parts
        for first in range(len(parts)):
            end = "/".join(parts[first:])
            for name in (end, stem(end)):
                if name in files:
                    return files[name]
        name = parts[-1]
        if bare(name) == name:
            name += EXTENSIONS[0]
        return os.path.join(folder, name)

    return find
