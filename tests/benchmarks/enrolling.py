"""The cost of enrollment by the number of classes.

    python tests/benchmarks/enrolling.py shots=10 classes=10,30,100,300,1000

Images of 64 px with one drawn object each and an untrained YOLO11n, on one CPU core. Prints the processor seconds of
the forward passes (four views of each image) and of each method without them, the peak memory, and the exponents.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from yolo_fewshot.data.support import read_support
from yolo_fewshot.enroll import enroll as module
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.nn.rows import class_rows

SIZE = 64
METHODS = ("mean", "fit", "auto")


def draw(folder: Path, classes: int, shots: int) -> Path:
    """Draw the shots, and return their data.yaml."""
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for i in range(classes * shots):
        image = rng.integers(0, 255, (SIZE // 8, SIZE // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        cv2.circle(image, (32, 32), 16, (i % 255, 0, 255 - i % 255), -1)
        cv2.imwrite(str(folder / f"images/{i}.png"), image)
        (folder / f"labels/{i}.txt").write_text(f"{i % classes} 0.5 0.5 0.5 0.5\n")
    names = "\n".join(f"  {i}: class{i}" for i in range(classes))
    (folder / "shots.yaml").write_text(f"train: images\nval: images\nnames:\n{names}\n")
    return folder / "shots.yaml"


def main(classes: str = "10,30,100,300,1000", shots: str = "10") -> None:
    """Print times, memory and exponents."""
    rows, sizes = [], [int(n) for n in classes.split(",")]
    extract = module.extract
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            support = read_support(draw(Path(folder), n, int(shots)))
            start = time.process_time()
            features = extract(class_rows(untrained()), support, SIZE)
            row = [time.process_time() - start]
        module.extract = lambda *_, f=features: f  # the same for every method
        for method in METHODS:
            model, start = untrained(), time.process_time()
            module.enroll(model, support, SIZE, method=method)
            row.append(time.process_time() - start)
        rows.append(row)
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        text = ", ".join(f"{k} {v:.2f} s" for k, v in zip(("forward", *METHODS), row))
        print(f"{n:>5} classes of {shots} shots: {text}; {held:.0f} MiB", flush=True)
    for k, column in zip(("forward", *METHODS), zip(*rows)):
        print(f"{k} grows to the power of {np.polyfit(np.log(sizes), np.log(column), 1)[0]:.2f}")


def untrained() -> FewShotDetectionModel:
    """Return an untrained model of two classes."""
    torch.manual_seed(0)
    model = FewShotDetectionModel("yolo11n-fewshot.yaml", nc=2, verbose=False).eval()
    model.names, model.args = {0: "a", 1: "b"}, {}
    return model


if __name__ == "__main__":
    main(**dict(x.split("=", 1) for x in sys.argv[1:]))
