"""Time and memory of a training step, compared with stock Ultralytics on the same images.

    python tests/benchmarks/training.py model=yolo11n imgsz=320 device=cpu
    python tests/benchmarks/training.py grow=True

Steps of stock, stage 1 and stage 2 (all terms on) alternate in one process. Prints medians and quartiles of the ratio
to the stock step beside. On a CPU the time is processor time, which other jobs affect little, and the memory is the
peak of a separate process; on a GPU the time includes synchronization, and the memory is that of the tensors. A step
is forward pass, loss, backward pass, clip, optimizer and moving average. `grow=True` prints how the step of stage 2
grows with ways, shots, image size and scale.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from overhead import CLASSES, episode
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import ModelEMA

from yolo_fewshot import args as table
from yolo_fewshot.nn.model import FewShotDetectionModel
from yolo_fewshot.train.guard import Guard

ARMS = {"stock": None, "stage 1": 1, "stage 2": 2}
REPEATS, WARM_UP = 15, 3


def stepper(arm: str, model: str, batch: dict, device: str, amp: str) -> Callable[[], None]:
    """Return a function that takes one training step."""
    stage = ARMS[arm]
    torch.manual_seed(0)
    if stage is None:
        net = DetectionModel(f"{model}.yaml", nc=CLASSES, verbose=False)
    else:
        net = FewShotDetectionModel(f"{model}-fewshot.yaml", nc=CLASSES, verbose=False)
    net = net.to(device).train()
    terms = {"supcon": 1.2, "cpe": 0.6, "triplet": 0.3} if stage == 2 else {}
    net.args = SimpleNamespace(**{**vars(get_cfg()), **(table.resolve({"stage": stage, **terms}) if stage else {})})
    optimizer, average = torch.optim.AdamW(net.parameters(), lr=1e-6), ModelEMA(net)
    guard = Guard(net) if stage else None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=amp == "fp16")

    def step() -> None:
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
            loss = net(batch)[0].sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if guard:
            guard.clip(10.0, 1.0, loss)
        else:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update(net)

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    """Return the seconds of a step."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def compare(
    arms: list[str], model: str, batch: dict, device: str, amp: str, repeats: int = REPEATS
) -> dict[str, list[float]]:
    """Return the seconds of alternating steps of some arms."""
    steps, times = {a: stepper(a, model, batch, device, amp) for a in arms}, {a: [] for a in arms}
    for i in range(WARM_UP + repeats):
        for arm in arms if i % 2 else arms[::-1]:
            took = seconds(steps[arm], device)
            if i >= WARM_UP:
                times[arm].append(took)
    return times


def memory(arm: str, model: str, batch: dict, device: str, amp: str) -> float:
    """Return the peak memory of three steps, in MiB."""
    step = stepper(arm, model, batch, device, amp)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(arm: str, **settings: str) -> float:
    """Return `memory` measured in a separate process."""
    argv = [sys.executable, __file__, f"memory={arm}", *(f"{k}={v}" for k, v in settings.items())]
    return float(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()[-1])


def grow(device: str) -> None:
    """Print how the step of stage 2 grows: seconds, ratio to stock on the same images, and the exponent."""
    start = {"n_way": 8, "k_shot": 1, "imgsz": 160, "model": "yolo11n"}
    values = {"n_way": (2, 8, 20, 40, 80), "k_shot": (1, 2, 4, 8), "imgsz": (96, 160, 320, 640)}
    values["model"] = ("yolo11n", "yolo11s", "yolo11m")
    for key, options in values.items():
        sizes, costs = [], []
        for value in options:
            x = {**start, key: value}
            batch = episode(x["imgsz"], device, x["n_way"], x["k_shot"])
            times = compare(["stock", "stage 2"], x["model"], batch, device, "none", 5)
            stock, ours = (statistics.median(times[a]) for a in ("stock", "stage 2"))
            sizes.append(value if key != "model" else len(costs) + 1)
            costs.append(ours)
            print(
                f"{key}={value}: {len(batch['img'])} images, {ours:.3g} s a step, {ours / stock:.3f} x stock",
                flush=True,
            )
        if key != "model":
            print(f"  grows with {key} to the power of {np.polyfit(np.log(sizes), np.log(costs), 1)[0]:.2f}")


def main(model: str = "yolo11n", imgsz: str = "320", device: str = "cpu", amp: str = "none", **more: str) -> None:
    """Print times and memory."""
    settings = {"model": model, "imgsz": imgsz, "device": device, "amp": amp}
    batch = episode(int(imgsz), device)
    if "memory" in more:
        print(memory(more["memory"], model, batch, device, amp))
        return
    if "grow" in more:
        grow(device)
        return
    held = {
        arm: in_a_process(arm, **settings) for arm in ARMS
    }  # first, since the peak of a process includes that of its parent
    times = compare(list(ARMS), model, batch, device, amp)
    print(f"{model}, {len(batch['img'])} images of {imgsz} px on {device}, amp={amp}, {REPEATS} repeats")
    print(f"stock: {statistics.median(times['stock']):.3g} s a step, {held['stock']:.0f} MiB")
    for arm in list(ARMS)[1:]:
        low, middle, high = statistics.quantiles([a / b for a, b in zip(times[arm], times["stock"])], n=4)
        print(f"{arm}: {middle:.3f} x stock ({low:.3f} to {high:.3f}), memory {held[arm] / held['stock']:.3f} x")


if __name__ == "__main__":
    main(**dict(x.split("=", 1) for x in sys.argv[1:]))
