"""What a stock checkpoint gives on new classes, enrolled without training: AP, false alarms and seconds.

    python tests/benchmarks/stock.py model=yolo11n.pt data=neu_det imgsz=256 base=coco.yaml background=images out=n.csv

`data` is a folder of K-shot lists, as `yolo-fewshot split` writes it: novel_{K}shot_seed{S}.txt, data.yaml and
images/novel_query. AP50 and AP are Ultralytics' on the query images, cAP50 and cAP are COCO's (faster-coco-eval, 101
points, 100 detections an image), in %. False alarms are the detections of new classes in an image of the val split of
`base`, which must not show them, above the suggested thresholds (0.25 without one), with and without `background`. Rows
are appended as they come, and finished ones are skipped. One CPU core by default (threads=1).
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ultralytics.data.utils import check_det_dataset
from ultralytics.nn.autobackend import check_class_names
from ultralytics.utils import YAML

from yolo_fewshot import FewShotYOLO
from yolo_fewshot.data.support import list_images
from yolo_fewshot.enroll import enroll as module
from yolo_fewshot.evaluate.alarms import false_alarms
from yolo_fewshot.evaluate.coco import coco_ap
from yolo_fewshot.evaluate.recorder import mean_ap, record

COLUMNS = (
    "shots",
    "seed",
    "method",
    "AP50",
    "AP",
    "cAP50",
    "cAP",
    "alarms",
    "alarms_bg",
    "AP50_bg",
    "seconds",
    "chosen",
)


def main(
    model: str,
    data: str,
    imgsz: str,
    base: str,
    background: str,
    out: str,
    shots: str = "1,3,5,10",
    seeds: str = "0,1,2",
    methods: str = "mean,fit,auto",
    threads: str = "1",
) -> None:
    """Measure every method with every number of shots and draw, and write a row for each."""
    torch.set_num_threads(int(threads))
    root, extract = Path(data).resolve(), module.extract
    names = check_class_names(YAML.load(root / "data.yaml")["names"])
    classes = range(len(names))
    ordinary = list_images(Path(check_det_dataset(base)["val"]))
    exists = Path(out).exists()
    done = {tuple(x[:3]) for x in csv.reader(Path(out).read_text().splitlines())} if exists else set()
    with open(out, "a", newline="") as file, tempfile.TemporaryDirectory() as folder:
        writer = csv.writer(file)
        if not exists:
            writer.writerow(COLUMNS)
        YAML.save(
            f"{folder}/query.yaml",
            {"path": str(root), "train": "images/novel_query", "val": "images/novel_query", "names": names},
        )

        def figures(yolo: FewShotYOLO) -> list[str]:
            """Return AP50, AP, COCO's AP50 and AP in %, and the false alarms."""
            measured, run = tuple(names.values()), {"imgsz": int(imgsz), "workers": 0}
            images, _ = record(yolo, f"{folder}/query.yaml", measured, Path(folder), **run)
            aps = [*(f"{x:.4f}" for x in mean_ap(images, classes))]
            aps += [f"{100 * x:.2f}" for x in coco_ap(images, classes)]
            new = tuple(yolo.model.enrolled)
            return [*aps, f"{false_alarms(yolo, ordinary, new, imgsz=int(imgsz)):.4f}"]

        for seed in seeds.split(","):
            for k in shots.split(","):
                lists = (root / f"novel_{k}shot_seed{seed}.txt").read_text().split()
                Path(f"{folder}/shots.txt").write_text("\n".join(str((root / x).resolve()) for x in lists))
                Path(f"{folder}/classes.txt").write_text("\n".join(names.values()))
                cache: dict[Any, Any] = {}

                def cached(rows: Any, support: Any, *args: Any, cache: Any = cache, **kwargs: Any) -> Any:
                    """Extract the features of a support set once for all methods, and count the time for each."""
                    key = str(support.source)
                    if key not in cache:
                        start = time.perf_counter()
                        features = extract(rows, support, *args, **kwargs)
                        cache[key] = features, time.perf_counter() - start
                    else:
                        cached.saved += cache[key][1]
                    return cache[key][0]

                module.extract = cached
                measured: dict[str, dict[str, str]] = {}  # by method; 'auto' is often one of the others
                for method in methods.split(","):
                    if (k, seed, method) in done:
                        continue
                    yolo, cached.saved, start = FewShotYOLO(model), 0.0, time.perf_counter()
                    yolo.enroll(f"{folder}/shots.txt", imgsz=int(imgsz), method=method)
                    seconds = time.perf_counter() - start + cached.saved
                    chosen = "+".join(sorted({x["method"] for x in yolo.model.enrolled.values()}))
                    row = {"shots": k, "seed": seed, "method": method, "seconds": f"{seconds:.1f}", "chosen": chosen}
                    if chosen not in measured:
                        measured[chosen] = dict(zip(("AP50", "AP", "cAP50", "cAP", "alarms"), figures(yolo)))
                    row |= measured[chosen]
                    if method == "auto":
                        yolo = FewShotYOLO(model)
                        yolo.enroll(f"{folder}/shots.txt", imgsz=int(imgsz), background=background)
                        row["AP50_bg"], *_, row["alarms_bg"] = figures(yolo)
                    writer.writerow([row.get(c, "") for c in COLUMNS])
                    file.flush()
                    print(row, flush=True)
    module.extract = extract


if __name__ == "__main__":
    main(**dict(x.split("=", 1) for x in sys.argv[1:]))
