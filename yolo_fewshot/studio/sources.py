"""What a source on disk holds: images, and the frames of videos."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import cv2
import numpy as np
from ultralytics.data.utils import IMG_FORMATS, VID_FORMATS

from yolo_fewshot.studio.images import MAX_PIXELS

CONTAINERS = (  # place in a video file, and what is there: MP4 and QuickTime, AVI, Matroska, ASF, MPEG, GIF and streams
    *((4, x) for x in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),
    *((8, b"AVI "), (0, b"\x1aE\xdf\xa3"), (0, b"0&\xb2u"), (0, b"\0\0\1\xba"), (0, b"\0\0\1\xb3"), (0, b"G")),
)


def files_of(source: str | Path, but: Path | None = None) -> list[Path]:
    """Return the images and videos of a source, by their suffixes; hidden files and folders are left out.

    Args:
        source (str | Path): File or folder.
        but (Path, optional): Folder to leave out.

    Raises:
        FileNotFoundError: If the source does not exist.
        ValueError: If it has no images and no videos.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"source='{source}' does not exist. It is a folder, an image or a video.")
    files = sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else [path]
    files = [x for x in files if not any(p.startswith(".") for p in x.relative_to(path).parts)]
    files = [x for x in files if x.suffix[1:].lower() in IMG_FORMATS | VID_FORMATS]
    if but is not None:
        left_out = but.resolve()
        files = [x for x in files if not x.resolve().is_relative_to(left_out)]
    if not files:
        raise ValueError(f"source='{source}' has no images and no videos.")
    return files


def is_video(name: str | Path) -> bool:
    """Return whether a file is a video, by its suffix.

    Args:
        name (str | Path): Its name.
    """
    return Path(name).suffix[1:].lower() in VID_FORMATS


def frames_of(file: str | Path, name: str, n: int) -> Generator[tuple[int, bytes], None, None]:
    """Yield frames of a video, evenly spread.

    Args:
        file (str | Path): The video.
        name (str): Its name, for messages only.
        n (int): Number of frames.

    Yields:
        (tuple[int, bytes]): Number of the frame in the video, and the frame as a JPEG file.

    Raises:
        ValueError: If no frame can be read.
    """
    with open(file, "rb") as f:
        start = f.read(12)
    # No playlists, which may name other files and hosts.
    video = cv2.VideoCapture(str(file) if any(start[i:].startswith(x) for i, x in CONTAINERS) else "")
    empty = True
    try:
        large = video.get(cv2.CAP_PROP_FRAME_WIDTH) * video.get(cv2.CAP_PROP_FRAME_HEIGHT) > MAX_PIXELS
        total = 0 if large else int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        places = np.unique(np.linspace(0, max(total - 1, 0), max(n, 1)).astype(int))[: max(total, 0)]
        for place in places.tolist():
            video.set(cv2.CAP_PROP_POS_FRAMES, place)
            ok, image = video.read()
            if ok:
                empty = False
                yield place, cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    finally:
        video.release()
    if empty:
        raise ValueError(f"{name} is not a video that OpenCV can read. Save its frames as images.")
