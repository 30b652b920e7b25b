"""Where the video of an annotation is, in a folder and its subfolders: by id with any usual extension, by the annotated
path, and by ever shorter ends of that path, down to the bare name. Links are followed."""
import os
from collections.abc import Callable
from pathlib import PurePosixPath

EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv")   # preferred ones first


def leaves(video: str) -> bool:
    """Whether an annotated path may lead out of the folder of the videos."""
    return PurePosixPath(video).is_absolute() or ".." in PurePosixPath(video).parts


def stem(name: str) -> str:
    """'sub/x.mp4' -> 'sub/x', but 'x_510.0' as it is."""
    extension = os.path.splitext(name)[1]
    return name[:-len(extension)] if extension.lower() in EXTENSIONS else name


def bare(path: str) -> str:
    """'./videos/x.mp4' -> 'x'"""
    return stem(PurePosixPath(path).name)


def finder(folder: str, allow_outside: bool = False) -> Callable[[str], str]:
    """find(video), of an id or an annotated path, is the path of its file in the folder, or else where it was expected.

    Of two files of one name the one in the upper folder is meant, then that of the extension first in EXTENSIONS.
    Raises ValueError when the folder cannot be listed or holds no video.
    """
    found, seen = [], set()
    try:
        os.scandir(folder).close()      # os.walk says nothing when it cannot list
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed ({error}); give --videos the folder of the videos") \
            from error
    for root, folders, names in os.walk(folder, followlinks=True):      # large data sets are often linked together
        if os.path.realpath(root) in seen:      # in a circle
            names, folders[:] = [], []
        seen.add(os.path.realpath(root))
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(root, folder)
        found += [os.path.normpath(f"{below}/{name}") for name in names
                  if stem(name) != name and not name.startswith(".")]
    if not found:
        raise ValueError(f"{folder}: no video files ({', '.join(EXTENSIONS)}); give --videos the folder of the "
                              "videos")
    files = {}
    for path in sorted(found, key=lambda p: (p.count("/"), EXTENSIONS.index(os.path.splitext(p)[1].lower()), p)):
        for key in (path, stem(path), os.path.basename(path), bare(path)):
            files.setdefault(key, os.path.join(folder, path))

    def find(video: str) -> str:
        path = PurePosixPath(video)
        if allow_outside and leaves(video) and os.path.isfile(os.path.join(folder, video)):
            return os.path.join(folder, video)
        parts = path.parts[-1:] if leaves(video) else path.parts
        ends = ["/".join(parts[i:]) for i in range(len(parts))]
        expected = os.path.join(folder, path.name if bare(video) != path.name else path.name + EXTENSIONS[0])
        return next((files[key] for end in ends for key in (end, stem(end)) if key in files), expected)

    return find
