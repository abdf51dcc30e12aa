"""Loss terms of the user's own, named by the key `terms`."""

import os
import sys

import pytest
import torch
from test_criterion import make, preds_of, term_of

from yolo_fewshot import EpisodeTerm, FewShotTrainer
from yolo_fewshot.nn.criterion import FewShotLoss
from yolo_fewshot.nn.own_terms import load_terms

SOURCE = """
import torch
from yolo_fewshot import EpisodeTerm

class One(EpisodeTerm):
    name, gain = "one_loss", 0.5

    def forward(self, episode):
        return episode.objects.sum()

class Keyed(EpisodeTerm):
    name, gain = "key_loss", "supcon"

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.ones(128))

    def forward(self, episode):
        return (episode.objects @ self.center).mean()

class Same(One):
    pass

class Long(One):
    name = "spread_loss"

class Short(One):
    name = "_loss"

class Odd(One):
    name = "spread"

class Comma(One):
    name = "a,b_loss"

class Taken(One):
    name = "tri_loss"

class Unnamed(EpisodeTerm):
    def forward(self, episode):
        return 0

class Negative(One):
    gain = -1.0

class Endless(One):
    gain = float("inf")

class Truth(One):
    gain = True

class Other(One):
    gain = "lr0"

class Empty(EpisodeTerm):
    name = "emp_loss"

class Asking(One):
    def __init__(self, margin):
        super().__init__()

class Trained(One):
    def __init__(self):
        super().__init__()
        self.proxy = torch.nn.Linear(2, 2)

class Vector(One):
    def forward(self, episode):
        return episode.objects.sum(0)

class Center(One):
    name = "cen_loss"

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, episode):
        self.count += 1
        self.center = 0.5 * self.center + 0.5 * episode.objects.detach().mean()
        return (episode.objects - self.center).square().mean()

class Plain:
    name, gain = "pla_loss", 1.0

function = print
"""
SYNTAX = "def f(:\n"
NESTED = "import a_module_that_is_not_there\n"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working directory with the user's modules, which are not on Python's path."""
    for name, text in {
        "mine": SOURCE,
        "broken": SYNTAX,
        "nested": NESTED,
        "raising": "import os\nos.nothing\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x not in {"", os.getcwd()}])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("mine", "broken", "nested", "raising"):
        sys.modules.pop(name, None)


def test_terms_are_found_in_the_working_directory_in_their_order(own):
    assert load_terms(None) == load_terms("") == []
    terms = load_terms(" mine.Keyed , mine.One")
    assert [type(t).__name__ for t in terms] == ["Keyed", "One"] and all(isinstance(t, EpisodeTerm) for t in terms)
    assert load_terms("mine.One")[0] is not terms[1]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("One", r"'terms=One' is an invalid value\. Valid 'terms' values are dotted paths"),
        ("elsewhere.One", r"'terms=elsewhere\.One' .* no module 'elsewhere' in .* or on Python's path"),
        ("mine.sub.One", "no module 'mine.sub'"),
        ("mine.Two", "Module 'mine' has no class 'Two'"),
        ("broken.One", "'broken' cannot be imported: SyntaxError"),
        ("nested.One", "'nested' cannot be imported: No module named 'a_module_that_is_not_there'"),
        ("raising.One", "'raising' cannot be imported: AttributeError"),
        ("mine.function", "'function' must be a subclass of yolo_fewshot.EpisodeTerm"),
        ("mine.Plain", "'Plain' must be a subclass of yolo_fewshot.EpisodeTerm"),
        ("mine.Long", "name='spread_loss' must end with '_loss' and have at most 10 characters"),
        ("mine.Short", "name='_loss' must end with '_loss' and have at most 10 characters"),
        ("mine.Odd", "name='spread' must end with '_loss'"),
        ("mine.Comma", "name='a,b_loss' must end with '_loss' and have at most 10 characters"),
        ("mine.Unnamed", "name='' must end with '_loss' and have at most 10 characters"),
        ("mine.Taken", "name='tri_loss' is taken"),
        ("mine.One,mine.Same", r"'terms=mine\.Same' .* name='one_loss' is taken"),
        ("mine.Negative", r"gain=-1\.0 must be a finite number >= 0"),
        ("mine.Endless", "gain=inf must be"),
        ("mine.Truth", "gain=True must be"),
        ("mine.Other", "gain='lr0' must be a number or one of the keys box, cls, dfl, supcon, cpe, triplet"),
        ("mine.Empty", r"'Empty' needs a method forward\(self, episode\)"),
        ("mine.Asking", r"'Asking\(\)' fails: .*margin.* created without arguments"),
        ("mine.Trained", r"Parameters such as 'proxy\.weight' would not be trained"),
    ],
)
def test_invalid_terms_raise_an_error_before_training(own, path, text):
    with pytest.raises(ValueError, match=text):
        FewShotTrainer("stage2.yaml", {"model": "fewshot.yaml", "terms": path, "project": str(own), "name": "run"})
    assert not (own / "run").exists()


def test_values_and_gradients_with_a_number_or_a_key_as_gain(own, batch):
    model = make(terms="mine.One,mine.Keyed", supcon=0.7)
    preds, loss = preds_of(model, batch), FewShotLoss(model)
    seen = []
    loss.observers.append(lambda loss, this: seen.extend([loss.episode(this).objects, loss.parts(this)]))
    _, items = loss(preds, batch)
    objects, parts = seen
    assert list(items)[-2:] == ["one_loss", "key_loss"] and len(objects) == len(batch["cls"])
    assert items["one_loss"].item() == pytest.approx(0.5 * objects.sum().item(), rel=1e-5)
    assert items["key_loss"].item() == pytest.approx(0.7 * objects.sum(1).mean().item(), rel=1e-5)
    (grad,) = torch.autograd.grad(parts["one_loss"], preds["embeds"], retain_graph=True)
    assert grad.any() and loss.episode_terms[-1].center.device == loss.device


def test_measuring_changes_no_buffer_of_a_term(own, batch):
    model = make(terms="mine.Center")
    loss, seen = FewShotLoss(model), []
    loss.observers.append(lambda loss, this: seen.extend([loss.episode(this).objects.mean(), loss.chance(this)]))
    loss(preds_of(model, batch), batch)
    term = loss.episode_terms[-1]
    assert len(seen) == 2 and term.count == 1 and dict(term.named_buffers())["center"] is term.center
    assert term.center.item() == pytest.approx(0.5 * seen[0].item(), rel=1e-5)


def test_an_error_names_the_term_that_returns_no_scalar(own, batch):
    model = make(terms="mine.Vector")
    with pytest.raises(TypeError, match=r"Vector\.forward must return a 0-dim tensor, got shape \(128,\)"):
        model(batch)


@pytest.mark.parametrize("term", ["sup_loss", "cpe_loss", "tri_loss"])
def test_a_term_with_a_gain_of_zero_is_not_computed(batch, term, monkeypatch):
    """So that a term that is not finite can be switched off: 0 times NaN is NaN."""
    key = {"sup_loss": "supcon", "cpe_loss": "cpe", "tri_loss": "triplet"}[term]
    model = make(**{key: 0.0})
    loss = FewShotLoss(model)
    monkeypatch.setattr(term_of(loss, term), "forward", lambda e: e.objects.sum() * float("nan"))
    preds = preds_of(model, batch)
    terms, items = loss(preds, batch)
    assert items[term] == 0 and torch.isfinite(terms).all() and terms[list(items).index(term)].requires_grad
    assert torch.isfinite(torch.autograd.grad(terms.sum(), preds["embeds"])[0]).all()


def test_a_run_resumes_with_its_terms_or_an_error_names_the_missing_module(own, draw_tiny):
    draw_tiny(own / "data", 8)
    keys = {
        "model": str(own / "data/yolo11n-tiny.yaml"), "data": str(own / "data/data.yaml"), "project": str(own),
        "name": "run", "imgsz": 64, "workers": 0, "epochs": 2, "episodes": 2, "n_way": 2, "plots": False,
        "terms": "mine.One",
    }  # fmt: skip
    trainer = FewShotTrainer("stage2.yaml", keys)

    def stop(trainer):
        raise KeyboardInterrupt

    trainer.add_callback("on_model_save", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    sys.modules.pop("mine")
    (own / "mine.py").rename(own / "moved.py")
    with pytest.raises(ValueError, match=r"'terms=mine\.One' is an invalid value\. There is no module 'mine'"):
        FewShotTrainer(overrides={"resume": str(trainer.last)})
    (own / "moved.py").rename(own / "mine.py")
    FewShotTrainer(overrides={"resume": str(trainer.last)}).train()
    header, *rows = (x.split(",") for x in (own / "run/results.csv").read_text().split())
    columns = [dict(zip(header, map(float, row))) for row in rows]
    assert [x["epoch"] for x in columns] == [1, 2]
    assert all(x["train/one_loss"] != 0 and x["val/one_loss"] == 0 and x["grad/one"] > 0 for x in columns)
