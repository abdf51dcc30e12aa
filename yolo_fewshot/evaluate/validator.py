"""Validation of few-shot models: classes are matched by name; results of base and novel classes."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils import LOGGER

from yolo_fewshot.class_names import UNKNOWN, check_unambiguous, match_classes, near_duplicates, repeated
from yolo_fewshot.errors import few
from yolo_fewshot.evaluate.metrics import COCO, RESULTS, FewShotMetrics


class MatchesByName:
    """Mixin of Ultralytics' validators that matches the labels to the model's classes by name.

    Enrolled classes are appended to the base classes, so a data set of shots numbers its classes differently. A name
    that several classes have is matched by index, see `match_classes`.
    """

    args: Any
    class_map: Any
    data: Any
    dataloader: Any
    device: Any
    is_coco: Any
    is_lvis: Any
    names: Any
    matched: dict[int, int]  # from class indices of the data to those of the model
    class_index: torch.Tensor

    def get_dataloader(self, dataset_path: str, batch_size: int) -> DataLoader:
        """Return Ultralytics' loader with all labels of the data.

        Args:
            dataset_path (str): Path to the images.
            batch_size (int): Images per batch.

        Returns:
            (DataLoader): The loader.
        """
        names, self.names = self.names, None  # with names, Ultralytics drops labels by their id in the data
        stock: Any = super()
        loader = stock.get_dataloader(dataset_path, batch_size)
        self.names = names
        return loader

    def init_metrics(self, model: nn.Module) -> None:
        """Match the classes by name before the first batch.

        Args:
            model (nn.Module): Model to validate.

        Raises:
            ValueError: If the images show a class that is unknown to the model or whose name is ambiguous.
        """
        stock: Any = super()
        stock.init_metrics(model)
        names = self.data["names"]
        index = match_classes(names, self.names)
        if self.is_coco or self.is_lvis:  # their annotations number the classes as the data does
            ids = self.class_map if self.is_coco else range(1, len(names) + 1)
            order = {i: j for j, i in index.items()}
            self.class_map = [ids[order[i]] if i in order else 0 for i in sorted(self.names)]
        if self.args.single_cls:  # every label is 0, and so is every prediction
            index = dict.fromkeys(names, 0)
        labeled = np.unique(np.concatenate([x["cls"].reshape(-1) for x in self.dataloader.dataset.labels])).astype(int)
        check_unambiguous(names, index, labeled, self.args.data)
        unknown = [names[i] for i in labeled if index[i] == UNKNOWN]
        if unknown:
            pairs = near_duplicates(unknown, self.names.values())
            spelled = f" Correct the spelling of {few(pairs, '; ')} if they are one." if pairs else ""
            raise ValueError(
                f"The images of '{self.args.data}' show {', '.join(map(str, unknown))}, which the model does not "
                f"know.{spelled} Enroll these classes first, e.g. with "
                "support=shots.yaml, or validate on other data."
            )
        self.matched = index
        self.class_index = torch.tensor([index[i] for i in range(len(names))], device=self.device)

    def preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Preprocess as Ultralytics does, with the model's class indices in `cls`.

        Args:
            batch (dict): Batch.

        Returns:
            (dict): Batch.
        """
        stock: Any = super()
        batch = stock.preprocess(batch)
        batch["cls"] = self.class_index[batch["cls"].long()].to(batch["cls"])
        return batch


class FewShotValidator(MatchesByName, DetectionValidator):
    """Ultralytics' validator with the labels matched to the model's classes by name, see `MatchesByName`.

    Outside of training it also reports the AP of base and novel classes and their harmonic mean, and saves them to
    `base_novel.csv`. Novel classes are those in the data.yaml's `fewshot: {novel: [...]}`, or else the enrolled ones.

    Attributes:
        metrics (FewShotMetrics): Results.

    Examples:
        >>> FewShotYOLO("best.pt").val(data="shots.yaml")
    """

    metrics: FewShotMetrics

    def __init__(
        self,
        dataloader: DataLoader | None = None,
        save_dir: Path | None = None,
        args: dict[str, Any] | SimpleNamespace | None = None,
        _callbacks: dict | None = None,
    ):
        """Initialize the validator.

        Args:
            dataloader (DataLoader, optional): Loader of the images.
            save_dir (Path, optional): Folder of the results.
            args (dict | SimpleNamespace, optional): Configuration.
            _callbacks (dict, optional): Callbacks, as in Ultralytics.
        """
        super().__init__(dataloader, save_dir, args, _callbacks)
        self.metrics = FewShotMetrics()

    def init_metrics(self, model: nn.Module) -> None:
        """Match the classes by name, and divide them into base and novel, before the first batch.

        Args:
            model (nn.Module): Model to validate.

        Raises:
            ValueError: If the images show a class that is unknown to the model or whose name is ambiguous, or if the
                data's section `fewshot` is malformed.
        """
        super().init_metrics(model)
        none = self.training or self.args.single_cls
        self.metrics.novel = set() if none else self._novel_classes(model, self.matched)

    def postprocess(self, preds: torch.Tensor | list | tuple) -> list[dict[str, torch.Tensor]]:
        """Apply NMS to one image after the other, since for a batch it has a time limit and drops what is left.

        Args:
            preds (torch.Tensor | list | tuple): Predictions (B, ...), or a sequence that begins with them.

        Returns:
            (list[dict[str, torch.Tensor]]): Detections of every image, as in Ultralytics.
        """
        stock: Any = super()
        images = preds[0] if isinstance(preds, (list, tuple)) else preds
        return [found for image in images.split(1) for found in stock.postprocess(image)]

    def _novel_classes(self, model: nn.Module, index: dict[int, int]) -> set[int]:
        """Return the novel classes as class indices of the model; `index` maps those of the data to them."""
        section, names = self.data.get("fewshot"), self.data["names"]
        if "fewshot" not in self.data or (isinstance(section, dict) and "ignore" in section and "novel" not in section):
            native = model.model if getattr(model, "format", None) == "pt" else model
            enrolled = getattr(native, "enrolled", None) or {}
            return {i for i, n in self.names.items() if str(n) in enrolled}
        novel = section.get("novel") if isinstance(section, dict) else None
        if not isinstance(novel, list):
            raise ValueError(
                f"'fewshot: {section}' in '{self.args.data}' has no list of novel classes. Name them, e.g. "
                f"'fewshot: {{novel: [{names[0]}]}}', or remove the section."
            )
        ids = {**{i: i for i in names}, **{str(n): i for i, n in names.items()}}
        unknown = [str(x) for x in novel if type(x) not in {int, str} or x not in ids]
        if unknown:
            raise ValueError(
                f"'fewshot: novel' in '{self.args.data}' lists {', '.join(unknown)}, which is not among its classes. "
                f"Use names from 'names:' (quote a name that is a number) or ids from 0 to {len(names) - 1}."
            )
        unclear = [x for x in repeated(names.values()) if x in novel]
        if unclear:
            raise ValueError(
                f"'fewshot: novel' in '{self.args.data}' lists {few(unclear)}, a name that several classes have. Use "
                f"their ids, from 0 to {len(names) - 1}."
            )
        return {i for i in (index[ids[x]] for x in novel) if i >= 0}

    def finalize_metrics(self) -> None:
        """Finalize the metrics as Ultralytics does, and save those of base and novel classes."""
        super().finalize_metrics()
        self._save_groups()

    def _save_groups(self) -> None:
        """Write `base_novel.csv`, if there are novel classes."""
        if self.metrics.groups:
            self.metrics.save_groups(self.save_dir / "base_novel.csv")

    def print_results(self) -> None:
        """Print Ultralytics' table, then base, novel and harmonic mean in its columns."""
        super().print_results()
        widths = {"images": "11", "instances": "11", **dict.fromkeys(RESULTS, "11.3g")}
        for name, group in self.metrics.groups.items():
            cells = (f"{group[k]:>{w}}" if k in group else " " * 11 for k, w in widths.items())
            LOGGER.info(f"{name:>22}{''.join(cells)}")

    def coco_evaluate(
        self,
        stats: dict[str, Any],
        pred_json: str | Path | list,
        anno_json: str | Path | dict,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Evaluate with faster-coco-eval as Ultralytics does, then base and novel classes separately.

        Args:
            stats (dict): Results so far.
            pred_json (str | Path | list): Predictions in COCO format.
            anno_json (str | Path | dict): Ground truth in COCO format.
            *args (Any): Ultralytics' arguments.
            **kwargs (Any): Ultralytics' arguments.

        Returns:
            (dict): Results, with those of base and novel classes and their harmonic means.
        """
        stats = super().coco_evaluate(stats, pred_json, anno_json, *args, **kwargs)
        truth, groups = getattr(self, "_coco_api", None), self.metrics.groups
        if not groups or truth is None:  # without faster-coco-eval Ultralytics has warned already
            return stats
        try:
            figures = self._coco_evaluate_groups(truth, pred_json)
        except Exception as e:  # as in Ultralytics, a failure here must not lose the results
            LOGGER.warning(f"faster-coco-eval unable to run on base and novel classes: {e}")
            return stats
        for name, aps in figures.items():
            self.metrics.add_coco(name, *aps)
        for name, group in groups.items():
            if COCO[0] in group:
                LOGGER.info(f"{name:>22} {', '.join(f'{k} = {group[k]:.3f}' for k in COCO)}")
        self._save_groups()
        return {**self.metrics.results_dict, **stats}

    def _coco_evaluate_groups(self, truth: Any, pred_json: str | Path | list) -> dict[str, tuple[float, float]]:
        """Return AP50 and AP50-95 of base and novel classes, if they have boxes."""
        from faster_coco_eval import COCOeval_faster

        predictions, figures = truth.loadRes(pred_json), {}
        images = truth.getImgIds() if self.gdict else [int(Path(x).stem) for x in self.dataloader.dataset.im_files]
        for name in ("base", "novel"):
            classes = [c for i, c in enumerate(self.class_map) if (i in self.metrics.novel) == (name == "novel")]
            val = COCOeval_faster(
                truth, predictions, iouType="bbox", lvis_style=self.is_lvis, print_function=lambda *_: None
            )
            val.params.imgIds, val.params.catIds = images, [c for c in classes if c in truth.cats]
            if not val.params.catIds:
                continue
            val.evaluate()
            val.accumulate()
            val.summarize()
            if val.stats_as_dict["AP_all"] >= 0:  # -1 where none of the classes has a box
                figures[name] = val.stats_as_dict["AP_50"], val.stats_as_dict["AP_all"]
        return figures


@functools.cache
def validator_like(stock: type) -> type:
    """Return the validator of a task that matches classes by name.

    Args:
        stock (type): Ultralytics' validator of the task.

    Returns:
        (type): `FewShotValidator` for detection, else a subclass of `stock`.
    """
    return FewShotValidator if stock is DetectionValidator else type(stock.__name__, (MatchesByName, stock), {})
