"""Makes a CPU look like two GPUs to Ultralytics, in every process that starts with this folder on its path.

Patched are the number of devices and their set-up, nothing else: Ultralytics' launcher, its worker script, samplers,
validation and checkpoints run as on two GPUs. What each process writes below `TWO_PROCESSES` is noted in a file there.
"""

import os
import sys


def two_devices() -> None:
    """Let every trainer see two devices, and its workers talk by gloo."""
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist
    from ultralytics.engine import validator
    from ultralytics.engine.trainer import BaseTrainer
    from ultralytics.utils import LOCAL_RANK, RANK

    stock, ddp = BaseTrainer.__init__, torch.nn.parallel.DistributedDataParallel

    def __init__(self, *args, **kwargs) -> None:
        stock(self, *args, **kwargs)
        self.world_size, self.ddp = 2, LOCAL_RANK == -1

    class OnTheCPU(ddp):
        def __init__(self, module, device_ids=None, **kwargs) -> None:
            super().__init__(module, **kwargs)

    class BackendOnTheCPU(validator.AutoBackend):
        def __init__(self, *args, device=None, **kwargs) -> None:
            super().__init__(*args, device=torch.device("cpu"), **kwargs)

    BaseTrainer.__init__ = __init__
    validator.AutoBackend = BackendOnTheCPU
    validator.get_torch_device_backend = lambda _: SimpleNamespace(current_device=lambda: 0)
    BaseTrainer._setup_ddp = lambda self: dist.init_process_group("gloo", rank=RANK, world_size=self.world_size)
    torch.nn.parallel.DistributedDataParallel = OnTheCPU


def note_writes(root: str) -> None:
    """Note the files below a folder that this process opens for writing, renames or removes."""
    log = os.open(os.path.join(root, f"writes-{os.environ['RANK']}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            paths = args[:1] if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else ()
        else:
            paths = args[:2] if event in {"os.rename", "os.remove"} else ()
        for path in paths:
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(root):
                os.write(log, f"{os.fspath(path)}\n".encode())

    sys.addaudithook(hook)


if "TWO_PROCESSES" in os.environ and "torch.distributed.run" not in sys.orig_argv:
    two_devices()
    if "RANK" in os.environ:
        note_writes(os.environ["TWO_PROCESSES"])
