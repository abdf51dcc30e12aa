"""Compare recipes on the same data, with and without injected faults: finite steps, and shares of the gradient.

    python tests/benchmarks/stability.py model=best.pt data=base.yaml imgsz=160 [steps=500] [fault_steps=60]
        [precision=fp32] [faults=logits,label,...] [arms=stock,before,after,unclamped,literal] [out=stability]

`model` is a few-shot checkpoint or a few-shot YAML; the stock arm trains the same network with a stock head. Every arm
takes `steps` optimizer steps on 16 images each; `literal` is the recipe with its 2-way episodes, of 4 images.
`precision` is fp32, bf16 or fp16: Ultralytics' `amp` on a GPU, autocast on a CPU, with a scaler for fp16.
Each finished row is appended to <out>/rows.jsonl, and rows in this file are not measured again.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import torch
from ultralytics.cfg import merge_equals_args, parse_key_value_pair
from ultralytics.data.utils import IMG_FORMATS, check_det_dataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from yolo_fewshot import FewShotTrainer, FewShotYOLO

IMAGES = 16  # in a step: stage2.yaml's episodes, Ultralytics' batch
TERMS = {"supcon": 1.2, "cpe": 0.6, "triplet": 0.3, "turned": 0.0}  # of the recipe that is compared
UNCLAMPED = {"dfl_side_max": 1e9, "dfl_mean_max": 1e9}
ARMS = {
    "stock": None,
    "before": {"dfl": 0.5, "lr0": 3e-5, "grad_clip": 10.0, **UNCLAMPED},
    "after": {},
    "unclamped": UNCLAMPED,
    "literal": {},
}
EXPECTED = {  # weighted terms after the remedies, by the document that the recipe comes from
    "box_loss": (3.0, 3.8), "cls_loss": (0.3, 0.4), "dfl_loss": (0.9, 1.1), "sup_loss": (0.4, 0.7),
    "cpe_loss": (0.0, 0.1), "tri_loss": (0.06, 0.1),
}  # fmt: skip


def once(layer, change):
    """Change the output of a layer in its next forward pass alone."""

    def hook(_, __, output):
        handle.remove()
        return change(output)

    handle = layer.register_forward_hook(hook)


def extreme_logits(trainer, batch):
    head = unwrap_model(trainer.model).model[-1]
    once(head, lambda p: {k: v * 1e4 if k in {"boxes", "scores", "embeds"} else v for k, v in p.items()})


def corrupt_label(trainer, batch):
    batch["bboxes"][0] = math.nan


def float16_overflow(trainer, batch):
    once(unwrap_model(trainer.model).model[9], lambda x: (x * 1e6).half().to(x.dtype))


def nan_image(trainer, batch):
    batch["img"][0, :, :8, :8] = math.nan


def nan_weight(trainer, batch):
    next(unwrap_model(trainer.model).model[4].parameters()).data.view(-1)[0] = math.nan


FAULTS = {
    "logits": extreme_logits, "label": corrupt_label, "float16": float16_overflow, "image": nan_image,
    "weight": nan_weight,
}  # fmt: skip


class Observed:
    """Mixin of a trainer that injects a fault at some batches and records every step."""

    fault, at, precision = None, (), "fp32"

    def run_callbacks(self, event):
        if event == "on_train_start":
            self.steps, self.seen, self.norms, self.bad, self.clamps = 0, 0, [], 0, 0
            if self.precision == "fp16" and self.device.type == "cpu":
                self.scaler = torch.amp.GradScaler("cpu")
        super().run_callbacks(event)

    def preprocess_batch(self, batch):
        batch = super().preprocess_batch(batch)
        if self.precision != "fp32" and self.device.type == "cpu":  # Ultralytics' autocast context ends this one
            torch.set_autocast_enabled("cpu", True)
            torch.set_autocast_dtype("cpu", {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision])
        if self.fault and self.seen in self.at:
            FAULTS[self.fault](self, batch)
        self.seen += 1
        return batch

    def autocast(self):
        if self.device.type != "cpu" or self.precision == "fp32":
            return super().autocast()
        return torch.autocast("cpu", dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision])

    def optimizer_step(self):
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads)) / IMAGES / self.scaler.get_scale()
        self.steps += 1
        if math.isfinite(norm):
            self.norms.append(norm)
        else:
            self.bad += 1
        super().optimizer_step()


class ObservedStock(Observed, DetectionTrainer):
    pass


class ObservedFewShot(Observed, FewShotTrainer):
    skipped = overflows = 0

    def save_metrics(self, metrics):
        super().save_metrics(metrics)
        self.skipped += self.guard.skipped
        self.overflows += self.guard.overflows
        self.clamps += int(self.read_results_csv()["train/means_clamped"][-1])


def count_images(source):
    """Return the number of images of a split, a folder or a .txt list."""
    if source.suffix == ".txt":
        return len(source.read_text().split())
    return sum(f.suffix[1:].lower() in IMG_FORMATS for f in source.rglob("*"))


def run(arm, fault, steps, args):
    """Train one arm and return its row."""
    settings = {k: args[k] for k in ("model", "data", "imgsz", "device", "seed") if k in args}
    settings |= {"project": str(args["out"].resolve()), "name": f"{arm}-{fault or 'none'}", "exist_ok": True}
    n = math.ceil(args["images"] / IMAGES)  # batches of an epoch
    if fault:
        n = min(n, max(steps // 3, 1))
    epochs = math.ceil(steps / n)
    settings |= {"epochs": epochs, "val": False, "plots": False, "verbose": False, "workers": 0, **args["extra"]}
    amp = {"fp32": False, "bf16": "bf16", "fp16": True}[args["precision"]]
    settings["amp"] = amp if torch.cuda.is_available() else False
    if arm == "stock":
        stock = args["out"] / "stock.pt"
        FewShotYOLO(args["model"]).fold().save(stock)
        part = {"batch": IMAGES, "nbs": IMAGES, "fraction": min(n * IMAGES / args["images"], 1.0)}
        trainer = ObservedStock(overrides={**settings, **part, "model": str(stock)})
    else:
        trainer = ObservedFewShot(
            "stage2-seed.yaml" if arm == "literal" else "stage2.yaml", {**TERMS, **settings, "episodes": n, **ARMS[arm]}
        )
    trainer.fault, trainer.precision = fault, args["precision"]
    # A third of the way through an epoch, the last batch of one, and two in a row.
    trainer.at = {n + n // 3, 2 * n - 1, 2 * n + n // 2, 2 * n + n // 2 + 1}
    log, ended = [], ""
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    LOGGER.addHandler(handler)
    try:
        trainer.train()
    except Exception as e:
        ended = f"{type(e).__name__}: {e}"[:200]
    finally:
        LOGGER.removeHandler(handler)
    items = {k: float(v) for k, v in (trainer.tloss or {}).items()}
    q = np.quantile(trainer.norms, (0.05, 0.5, 0.95, 1.0)).tolist() if trainer.norms else []
    return {
        "arm": arm, "fault": fault, "precision": args["precision"], "steps": trainer.steps, "planned": n * epochs,
        "skipped": getattr(trainer, "skipped", None), "overflows": getattr(trainer, "overflows", None),
        "nonfinite_gradients": trainer.bad, "mean_clamps": trainer.clamps, "norm_quantiles": q, "terms": items,
        "dfl_share": items.get("dfl_loss", math.nan) / sum(items.values()) if items else math.nan,
        "loss": sum(items.values()), "rollbacks": sum("recovering from last.pt" in x for x in log), "ended": ended,
        "finite": all(torch.isfinite(v).all().item() for v in unwrap_model(trainer.model).state_dict().values()),
    }  # fmt: skip


def table(rows):
    """Print the rows as tables."""
    heads = {
        "precision": "precision", "fault": "fault", "arm": "arm", "steps": "steps", "skipped": "skipped",
        "overflows": "AMP overflows", "nonfinite_gradients": "non-finite gradients", "rollbacks": "epochs rolled back",
        "mean_clamps": "mean DFL clamped", "norm_quantiles": "gradient norm: 5 %, 50 %, 95 %, most",
        "dfl_share": "share of DFL", "loss": "loss", "ended": "ends", "finite": "weights finite",
    }  # fmt: skip
    print("\n| " + " | ".join(heads.values()) + " |\n" + "|---" * len(heads) + "|")
    for r in rows:
        cells = {
            **r, "fault": r["fault"] or "none", "steps": f"{r['steps']} of {r['planned']}",
            "norm_quantiles": ", ".join(f"{x:.3g}" for x in r["norm_quantiles"]), "dfl_share": f"{r['dfl_share']:.1%}",
            "loss": f"{r['loss']:.3f}", "ended": r["ended"] or "at the end", "finite": "yes" if r["finite"] else "NO",
        }  # fmt: skip
        print("| " + " | ".join("-" if cells[k] is None else str(cells[k]) for k in heads) + " |")
    for r in rows:
        if r["arm"] in {"after", "literal"} and not r["fault"]:
            print(f"\n| {r['precision']}, {r['arm']}: weighted term, mean of the last epoch | expected | measured |")
            print("|---|---|---|")
            for k, v in r["terms"].items():
                expected = "{} to {}".format(*EXPECTED[k]) if k in EXPECTED else "-"
                print(f"| {k} | {expected} | {v:.3f} |")


def main():
    args = {
        "imgsz": 640,
        "steps": 500,
        "fault_steps": 60,
        "precision": "fp32",
        "seed": 0,
        "out": "stability",
        "extra": {},
    }
    args |= {"arms": ",".join(ARMS), "faults": ",".join(FAULTS)}
    for text in merge_equals_args(sys.argv[1:]):
        key, value = parse_key_value_pair(text)
        (args if key in {*args, "model", "data", "device"} else args["extra"])[key] = value
    args["out"] = Path(args["out"])
    args["out"].mkdir(parents=True, exist_ok=True)
    data = check_det_dataset(args["data"])
    args["images"] = count_images(Path(data["train"]))
    file = args["out"] / "rows.jsonl"
    rows = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []
    done = {(r["arm"], r["fault"], r["precision"]) for r in rows}
    for fault in (None, *[f for f in str(args["faults"]).split(",") if f in FAULTS]):
        for arm in str(args["arms"]).split(","):
            if (arm, fault, args["precision"]) not in done:
                rows.append(run(arm, fault, args["fault_steps"] if fault else args["steps"], args))
                with open(file, "a") as f:
                    f.write(json.dumps(rows[-1]) + "\n")
    table(rows)


if __name__ == "__main__":
    main()
