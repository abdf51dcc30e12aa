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
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from ultralytics.data.utils import check_det_dataset, img2label_paths
from ultralytics.nn.autobackend import check_class_names
from ultralytics.utils import YAML

from yolo_fewshot import FewShotYOLO
from yolo_fewshot.data.support import list_images
from yolo_fewshot.enroll import enroll as module

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


def truth(images: list[str], names: dict[int, str]) -> dict[str, Any]:
    """Return the labels of images in COCO format, with class names as categories."""
    boxes: list[dict[str, Any]] = []
    sizes = []
    for file, label in zip(images, img2label_paths(images)):
        height, width = cv2.imread(file).shape[:2]
        sizes.append({"id": Path(file).stem, "file_name": file, "height": height, "width": width})
        rows = np.loadtxt(label, ndmin=2) if Path(label).is_file() and Path(label).stat().st_size else np.zeros((0, 5))
        for c, x, y, w, h in rows:
            size = [w * width, h * height]
            box = [x * width - size[0] / 2, y * height - size[1] / 2, *size]
            entry = {"category_id": names[int(c)], "bbox": box, "area": size[0] * size[1], "iscrowd": 0}
            boxes.append({"id": len(boxes) + 1, "image_id": Path(file).stem, **entry})
    return {"images": sizes, "annotations": boxes, "categories": [{"id": n, "name": n} for n in names.values()]}


def coco_ap(labels: dict[str, Any], predictions: list[dict[str, Any]], shown: list[str]) -> tuple[float, float]:
    """Return COCO's AP50 and AP of the shown classes, in %."""
    from faster_coco_eval import COCO, COCOeval_faster

    number = {x["id"]: i + 1 for i, x in enumerate(labels["images"])}
    kind = {n: i + 1 for i, n in enumerate(shown)}

    def numbered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        ids = ({"image_id": number[x["image_id"]], "category_id": kind[x["category_id"]]} for x in rows)
        return [{**x, **i} for x, i in zip(rows, ids)]

    labels = {
        "images": [{**x, "id": number[x["id"]]} for x in labels["images"]],
        "annotations": numbered([x for x in labels["annotations"] if x["category_id"] in kind]),
        "categories": [{"id": i, "name": n} for n, i in kind.items()],
    }
    coco = COCO(labels)
    found = coco.loadRes(numbered([x for x in predictions if x["category_id"] in kind]))
    val = COCOeval_faster(coco, found, iouType="bbox", print_function=lambda *_: None)
    val.evaluate()
    val.accumulate()
    val.summarize()
    return 100 * float(val.stats[1]), 100 * float(val.stats[0])


def predictions(yolo: FewShotYOLO, folder: Path) -> list[dict[str, Any]]:
    """Return the predictions of a validation, with class names as categories and file stems as images."""
    found = json.loads((folder / "predictions.json").read_text())
    return [
        {**x, "category_id": yolo.names[x["category_id"] - 1], "image_id": Path(x["file_name"]).stem} for x in found
    ]


def false_alarms(model: FewShotYOLO, images: list[str], imgsz: int) -> float:
    """Return the detections of enrolled classes in an image above their suggested thresholds."""
    conf = {n: x["conf"] or 0.25 for n, x in model.model.enrolled.items()}  # 0.25 is the default of predict
    n = 0
    for result in model.predict(images, stream=True, imgsz=imgsz, conf=0.01, max_det=1000, verbose=False, save=False):
        for c, s in zip(result.boxes.cls.tolist(), result.boxes.conf.tolist()):
            limit = conf.get(result.names[int(c)])
            n += limit is not None and s >= limit
    return n / len(images)


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
    queries = list_images(root / "images/novel_query")
    labels = truth(queries, names)
    shown = sorted({x["category_id"] for x in labels["annotations"]})
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
        run = {"batch": 1, "project": folder, "exist_ok": True, "plots": False, "verbose": False, "workers": 0}
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
                        metrics = yolo.val(data=f"{folder}/query.yaml", imgsz=int(imgsz), save_json=True, **run)
                        aps = coco_ap(labels, predictions(yolo, metrics.save_dir), shown)
                        figures = [*(f"{metrics.groups['novel'][x]:.4f}" for x in ("mAP50", "mAP50-95"))]
                        figures += [*(f"{x:.2f}" for x in aps), f"{false_alarms(yolo, ordinary, int(imgsz)):.4f}"]
                        measured[chosen] = dict(zip(("AP50", "AP", "cAP50", "cAP", "alarms"), figures))
                    row |= measured[chosen]
                    if method == "auto":
                        yolo = FewShotYOLO(model)
                        yolo.enroll(f"{folder}/shots.txt", imgsz=int(imgsz), background=background)
                        metrics = yolo.val(data=f"{folder}/query.yaml", imgsz=int(imgsz), **run)
                        row["AP50_bg"] = f"{metrics.groups['novel']['mAP50']:.4f}"
                        row["alarms_bg"] = f"{false_alarms(yolo, ordinary, int(imgsz)):.4f}"
                    writer.writerow([row.get(c, "") for c in COLUMNS])
                    file.flush()
                    print(row, flush=True)
    module.extract = extract


if __name__ == "__main__":
    main(**dict(x.split("=", 1) for x in sys.argv[1:]))
