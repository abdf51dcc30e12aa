"""Track objects of new classes in a video.

    yolo track model=best.pt source=street.mp4 support=shots.yaml
    python examples/track_video.py best.pt fewshot-demo-novel.yaml street.mp4

Without a video argument it writes one, in which an image of the built-in data moves.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from ultralytics.data.utils import check_det_dataset

from yolo_fewshot import FewShotYOLO


def main(weights: str, support: str = "fewshot-demo-novel.yaml", video: str = "", **settings: Any) -> dict[str, int]:
    """Track the classes of a few-shot model and those of a support set.

    Args:
        weights (str): Few-shot checkpoint.
        support (str): Support set.
        video (str): Video.
        **settings (Any): Further arguments of `track`.

    Returns:
        (dict[str, int]): Number of tracked objects of each class.
    """
    video = video or str(moving_image(next(Path(check_det_dataset(support)["val"]).glob("*")), Path("moving.mp4")))
    model, tracks = FewShotYOLO(weights), {}
    for frame in model.track(video, support=support, stream=True, **{"save": True, "verbose": False, **settings}):
        if frame.boxes.is_track:
            tracks.update(zip(frame.boxes.id.int().tolist(), frame.boxes.cls.int().tolist()))
    names = [model.names[c] for c in tracks.values()]
    counts = {n: names.count(n) for n in dict.fromkeys(names)}
    print(", ".join(f"{k} {n}" for n, k in counts.items()) or "No object was tracked.")
    return counts


def moving_image(image: Path, video: Path, frames: int = 30) -> Path:
    """Write a video in which an image moves to the right and down.

    Args:
        image (Path): Image.
        video (Path): MP4 file to write.
        frames (int): Number of frames.

    Returns:
        (Path): The file.
    """
    pixels = cv2.imread(str(image))
    h, w = pixels.shape[:2]
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"mp4v"), 10, (w, h))
    for i in range(frames):
        shift = np.float32([[1, 0, i / 2], [0, 1, i / 4]])
        writer.write(cv2.warpAffine(pixels, shift, (w, h), borderMode=cv2.BORDER_REFLECT))
    writer.release()
    return video


if __name__ == "__main__":
    main(*sys.argv[1:])
