"""Make K-shot splits of your own data, YOLO folders or COCO jsons.

    python examples/my_data.py data.yaml scooter,bus my_split
    python examples/my_data.py instances_train.json scooter,bus my_split images=train \
        val=instances_val.json val_images=val

Without arguments it splits the built-in data, once as YOLO folders and once as COCO jsons, which it writes first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cv2
from ultralytics.data.utils import check_det_dataset, img2label_paths
from ultralytics.utils import YAML

from yolo_fewshot.data.splits import split


def main(data: str = "fewshot-demo.yaml", novel: str = "gear,key,tree", out: str = "my_split", **more: Any) -> Path:
    """Split a data set, and print the commands that use it.

    Args:
        data (str): data.yaml, or COCO json of the train images.
        novel (str): Names of the novel classes.
        out (str): Folder to write.
        **more (Any): Further arguments of `split`; with a COCO json `images`, `val` and `val_images`.

    Returns:
        (Path): The folder.
    """
    folder = split(data, novel, out=out, **{"shots": (1, 5), "seeds": 2, **more})
    base = YAML.load(folder / "base.yaml")["names"]
    print(f"{len(base)} base classes in {folder / 'base.yaml'}; then")
    print(f"  yolo train model=fewshot.yaml cfg=stage1.yaml data={folder / 'base.yaml'} name=stage1")
    stage1 = "runs/detect/stage1/weights/best.pt"
    print(f"  yolo train model={stage1} cfg=stage2.yaml data={folder / 'base.yaml'} name=stage2")
    shots = folder / "novel_5shot_seed0.yaml"
    print(f"  yolo val model=runs/detect/stage2/weights/best.pt data={folder / 'data.yaml'} support={shots}")
    return folder


def to_coco(data: str, kind: str, out: Path) -> Path:
    """Write the COCO json of a split of a YOLO data set, with the fields that `split` reads.

    Args:
        data (str): data.yaml.
        kind (str): 'train' or 'val'.
        out (Path): File to write.

    Returns:
        (Path): The file.
    """
    read = check_det_dataset(data)
    images, annotations = [], []
    for file in sorted(map(str, Path(read[kind]).iterdir())):
        height, width = cv2.imread(file).shape[:2]
        images.append({"id": len(images), "file_name": Path(file).name, "height": height, "width": width})
        for line in Path(img2label_paths([file])[0]).read_text().splitlines():
            c, x, y, w, h = map(float, line.split())
            box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            annotations.append(
                {"id": len(annotations), "image_id": images[-1]["id"], "category_id": int(c), "bbox": box, "iscrowd": 0}
            )
    categories = [{"id": i, "name": n} for i, n in read["names"].items()]
    out.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return out


if __name__ == "__main__":
    given = [x for x in sys.argv[1:] if "=" not in x]
    main(*given, **dict(x.split("=", 1) for x in sys.argv[1:] if "=" in x))
    if not given:
        read = check_det_dataset("fewshot-demo.yaml")
        train, val = (to_coco("fewshot-demo.yaml", k, Path(f"{k}.json")) for k in ("train", "val"))
        keys = {"images": str(read["train"]), "val": str(val), "val_images": str(read["val"])}
        main(str(train), out="my_split_coco", **keys)
