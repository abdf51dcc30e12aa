"""The cost of guard and loss monitor, relative to a training step.

    python tests/benchmarks/overhead.py [yolo11n-fewshot.yaml] [imgsz] [device]

The steps to compare alternate in one process. Prints medians. The guard is compared with Ultralytics' clip,
`clip_grad_norm_`, on the same gradients.
"""

from __future__ import annotations

import statistics
import sys
import time
from types import SimpleNamespace

import torch
from ultralytics.cfg import get_cfg

from yolo_fewshot import args as table
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.train.guard import Guard
from yolo_fewshot.train.monitor import LossMonitor

OBJECTS, CLASSES = 4, 80


def episode(imgsz: int, device: str, n_way: int = 8, k_shot: int = 1) -> dict:
    """Return an episode of noise images with one query image per way."""
    g = torch.Generator().manual_seed(0)
    images, support = n_way * (k_shot + 1), n_way * k_shot
    n = images * OBJECTS
    batch = {
        "img": torch.rand(images, 3, imgsz, imgsz, generator=g),
        "cls": torch.randint(min(n_way, CLASSES), (n, 1), generator=g).float(),
        "bboxes": torch.cat([0.3 + 0.4 * torch.rand(n, 2, generator=g), 0.1 + 0.2 * torch.rand(n, 2, generator=g)], 1),
        "batch_idx": torch.arange(images).repeat_interleave(OBJECTS).float(),
        "support": torch.arange(images) < support,
        "query": torch.arange(support, images),
        "way": torch.arange(images) % n_way,
    }
    return {k: v.to(device) for k, v in batch.items()}


def main() -> None:
    """Print the times."""
    cfg, imgsz, device = (sys.argv[1:] + ["yolo11n-fewshot.yaml", "320", "cpu"][len(sys.argv) - 1 :])[:3]
    model = FewShotDetectionModel(cfg, nc=CLASSES, verbose=False).to(device).train()
    model.args = SimpleNamespace(
        **{**vars(get_cfg()), **table.resolve({"stage": 2, "supcon": 1.2, "cpe": 0.6, "triplet": 0.3})}
    )
    batch, optimizer = episode(int(imgsz), device), torch.optim.AdamW(model.parameters(), lr=1e-6)
    guard, doctor, scaler = Guard(model), LossMonitor(2), torch.amp.GradScaler(enabled=False)
    times: dict[str, list[float]] = {k: [] for k in ("plain", "measured", "stock clip", "guard")}

    def timed(name: str, f) -> None:
        start = time.perf_counter()
        f()
        if device != "cpu":
            torch.cuda.synchronize()
        times[name].append(time.perf_counter() - start)

    for i in range(24):
        doctor.begin_batch(model, scaler)

        def step() -> None:
            loss = model.loss(batch)[0].sum()
            loss.backward()
            optimizer.step()

        optimizer.zero_grad()
        timed("plain" if i % 2 else "measured", step)
        for k in range(10):
            names = ("stock clip", "guard") if k % 2 else ("guard", "stock clip")
            for name in names:
                if name == "guard":
                    timed(name, lambda: guard.clip(1e9, 1.0, torch.zeros((), device=device)))
                else:
                    timed(name, lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))
    m = {k: statistics.median(v[2:]) for k, v in times.items()}
    print(f"{cfg}, {len(batch['img'])} images of {imgsz} px on {device}: a step takes {m['plain'] * 1e3:.1f} ms")
    print(f"clip of Ultralytics {m['stock clip'] * 1e3:.2f} ms, guard {m['guard'] * 1e3:.2f} ms: ", end="")
    print(f"{(m['guard'] - m['stock clip']) / m['plain']:+.2%} of a step")
    extra, every = m["measured"] - m["plain"], table.KEYS["doctor"].default
    print(f"a measured step takes {extra * 1e3:.0f} ms more: ", end="")
    print(f"{extra / m['plain'] / every:.2%} of a step with doctor={every}")


if __name__ == "__main__":
    main()
