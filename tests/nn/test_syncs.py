"""How often the CPU waits for the device in a training step, against Ultralytics' own loss on the same batch.

Waits are counted on the stand-in device of `standin.py`: what it counts is what waits on a CUDA device. Copies to the
device count whether or not their memory is pinned. A loss is called once before it is counted, since the first batch
of a run, and with boxes to ignore the first of a size, may wait for what the others need not ask for again.
"""

from copy import deepcopy

import pytest
import torch
from standin import DEVICE, Device, to_device
from test_criterion import make, term_of
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss

from yolo_fewshot.nn.criterion import branch_losses
from yolo_fewshot.nn.ignore import IGNORED
from yolo_fewshot.train.retention import Teacher, replay_targets

pytestmark = pytest.mark.slow

FAMILIES = ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"]
SILENT = torch.tensor([4, 5])  # classes that no image of the batch shows


@pytest.fixture
def device():
    with Device() as device:
        yield device


@pytest.fixture
def batch(batch):
    """The episode as `EpisodicDataset` collates it."""
    return {**batch, "query": (~batch["support"]).nonzero()[:, 0]}


def with_ignored(batch):
    """The batch with a box to ignore in every image, before its objects or after them."""
    rows = torch.cat([batch["batch_idx"][:, None], batch["cls"], batch["bboxes"]], 1)
    ignored = torch.tensor([[i, IGNORED, 0.7, 0.3, 0.4, 0.5] for i in range(len(batch["img"]))])
    rows = torch.cat([ignored[::2], rows, ignored[1::2]])
    rows = rows[rows[:, 0].argsort(stable=True)]
    return {**batch, "batch_idx": rows[:, 0], "cls": rows[:, 1:2], "bboxes": rows[:, 2:]}


def prepare(cfg, stage, batch, masked=False, **values):
    """A model in training and its batch, both still on the CPU."""
    model = make(cfg, stage=stage, **values)
    if stage == 3:
        start = deepcopy(model)
        rows = torch.randn(8, start.model[-1].embed), torch.arange(8) % 3, torch.arange(8) % 6
        start.memory = [rows for _ in start.model[-1].branches]
        for loss, retained in zip(branch_losses(model), replay_targets(start, SILENT)):
            loss.retention = retained
        batch = {**batch, "teacher": Teacher(start, SILENT)(batch["img"])}
    for loss in branch_losses(model):
        loss.masked = masked
    return model, batch


def there(model, batch):
    """Both of them on the device."""
    retained = [x.retention for x in branch_losses(model)]
    masked = branch_losses(model)[0].masked
    model.criterion = None
    for loss, x in zip(branch_losses(to_device(model)), retained):
        loss.retention, loss.masked = x and type(x)(x.branch, *to_device(x[1:])), masked
    return model, to_device(batch)


def waits(device, criterion, model, batch):
    """Waits of the forward pass, of the loss and of the backward pass."""
    found = []

    def counted(step, *args):
        device.waits.clear()
        result = step(*args)
        found.append(device.waits.total())
        return result

    preds = counted(model, batch["img"])
    criterion(preds, batch)
    loss = counted(criterion, preds, batch)[0]
    counted(loss.sum().backward)
    return found


def stock(model):
    return E2ELoss(model) if len(model.model[-1].branches) > 1 else v8DetectionLoss(model)


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 1], "index"),
        (lambda x: x.masked_select(x > 1), "masked_select"),
        (lambda x: x.__setitem__(x > 1, torch.zeros(1, device=DEVICE)), "index_put_"),
        (lambda x: x.unique(), "_unique2"),
        (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"),
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool(x.any()), "_local_scalar_dense"),
        (lambda x: x.tolist(), "copy to the CPU"),
        (lambda x: x.cpu(), "copy to the CPU"),
        (lambda x: torch.tensor([1, 2], device=DEVICE), "copy to the device"),
        (lambda x: x.new_tensor([1, 2]), "copy to the device"),
        (lambda x: x[[1, 0]], "copy to the device"),
    ],
)
def test_stand_in_counts_operations_that_wait(device, work, kind):
    x = torch.arange(3.0, device=DEVICE)
    device.waits.clear()
    work(x)
    assert +device.waits == {kind: 1}


def test_stand_in_counts_no_other_operations(device):
    x = torch.arange(3.0, device=DEVICE)
    device.waits.clear()
    x[x.long()] = 1.0
    x[1:] += 2 * x.argsort()[:2] + torch.tensor(3.0)
    torch.where(x > 1, x, 0).index_add(0, x.long().clamp(max=2), x).sum().clamp(min=1)
    assert device.waits.total() == 0


@pytest.mark.parametrize(
    ("stage", "masked", "more"), [(1, False, 0), (1, True, 0), (2, False, 1), (2, True, 1), (3, False, 0), (3, True, 0)]
)
@pytest.mark.parametrize("cfg", FAMILIES)
def test_a_step_waits_once_more_per_branch_in_stage_two_only(device, batch, cfg, stage, masked, more):
    shown = with_ignored(batch) if masked else batch
    model, shown = there(*prepare(cfg, stage, shown, masked))
    ours, theirs = waits(device, model.criterion, model, shown), waits(device, stock(model), model, to_device(batch))
    assert ours[0] == 0 and theirs[1] > 10  # the few-shot head waits for nothing
    assert ours[1] <= theirs[1] + more * len(model.model[-1].branches)
    assert ours[2] <= theirs[2]


def test_a_batch_without_query_indices_waits_once_more(device, batch):
    model, shown = there(*prepare(FAMILIES[0], 2, batch))
    told = waits(device, model.criterion, model, shown)
    del shown["query"]
    assert waits(device, model.criterion, model, shown)[1] == told[1] + 1


@pytest.mark.parametrize("cfg", FAMILIES)
def test_a_custom_term_gets_rows_without_padding_and_without_a_wait(device, batch, cfg):
    model, shown = there(*prepare(cfg, 2, with_ignored(batch), True, terms="test_criterion.OwnTerm"))
    plain, _ = there(*prepare(cfg, 2, batch, True))
    own = waits(device, model.criterion, model, shown)
    assert own == waits(device, plain.criterion, plain, shown)
    pooled = term_of(branch_losses(model)[0], "own_loss").episode
    assert pooled.ways.tolist() == [0, 1, 2] and len(pooled.prototypes) == 3
    assert pooled.y.tolist() == batch["cls"].flatten().tolist() and len(pooled.objects) == len(batch["cls"])
    assert pooled.objects.norm(dim=1).tolist() == pytest.approx([1.0] * len(pooled.y))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("cfg", FAMILIES)
def test_losses_and_gradients_on_the_device_are_those_on_the_cpu(device, batch, cfg, stage):
    here, shown = prepare(cfg, stage, with_ignored(batch), True)
    found = []
    for place in (lambda *a: a, there):
        model, x = place(here, shown)
        model.zero_grad()
        torch.manual_seed(0)
        terms = model(x)[0]
        terms.sum().backward()
        grads = {k: p.grad.cpu() for k, p in model.named_parameters() if p.grad is not None}
        found.append((terms.detach().cpu(), grads))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
