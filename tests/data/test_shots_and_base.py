from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ultralytics.data.build import InfiniteDataLoader
from ultralytics.data.dataset import YOLODataset

from yolo_fewshot.data.shots_and_base import AdaptSampler, ShotsAndBase, merged_names, relabel

# Names and labels


def labels_of(*classes):
    return [
        {"im_file": f"{i}.png", "cls": np.array(c, np.float32).reshape(-1, 1), "bboxes": np.full((len(c), 4), i / 10)}
        for i, c in enumerate(classes)
    ]


def test_new_classes_are_appended_in_the_order_of_their_label_index():
    known = {0: "a", 1: "b"}
    names = {0: "d", 1: "b", 2: "e", 3: "c", 4: "unseen"}
    assert merged_names(known, names, labels_of([3, 1], [], [0, 0, 2])) == {0: "a", 1: "b", 2: "d", 3: "e", 4: "c"}
    assert known == {0: "a", 1: "b"}
    assert merged_names(known, names, labels_of([1], [])) == known
    assert merged_names(known, names, []) == known
    assert merged_names({0: "1"}, {0: 2, 1: 1}, labels_of([0, 1])) == {0: "1", 1: "2"}  # names that YAML made numbers


def test_labels_get_the_class_indices_of_a_model_by_name():
    dataset = SimpleNamespace(labels=labels_of([0, 2, 0], [], [1]))
    relabel(dataset, {0: "c", 1: "a", 2: "b", 3: "unseen"}, {0: "a", 1: "b", 2: "x", 3: "c"})
    assert [x["cls"].tolist() for x in dataset.labels] == [[[3], [1], [3]], [], [[0]]]
    assert all(x["cls"].dtype == np.float32 and x["cls"].shape[1:] == (1,) for x in dataset.labels)
    with pytest.raises(
        ValueError, match=r"^1\.png has labels of c, d, which the model does not know and which have no shots"
    ):
        relabel(
            SimpleNamespace(labels=labels_of([0], [2, 3, 2], [0])),
            {0: "a", 1: "b", 2: "d", 3: "c"},
            {0: "a", 1: "b"},
        )


# The data set


class Part:
    """What `ShotsAndBase` uses of a `YOLODataset`."""

    def __init__(self, name, n):
        self.name, self.labels, self.closed = name, [{"im_file": f"{name}{i}"} for i in range(n)], []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        assert 0 <= i < len(self)
        return f"{self.name}{i}"

    def close_mosaic(self, hyp):
        self.closed.append(hyp)

    collate_fn = staticmethod(YOLODataset.collate_fn)


@pytest.mark.parametrize("sizes", [(3,), (3, 2), (1, 5)])
def test_base_images_come_after_the_shots(sizes):
    parts = [Part(name, n) for name, n in zip("ab", sizes)]
    dataset = ShotsAndBase(parts)
    expected = [f"{name}{i}" for name, n in zip("ab", sizes) for i in range(n)]
    assert [dataset[i] for i in range(len(dataset))] == expected
    assert [x["im_file"] for x in dataset.labels] == expected and len(dataset) == sum(sizes)
    assert dataset.collate_fn is parts[0].collate_fn
    with pytest.raises(IndexError):
        dataset[sum(sizes)]


def test_both_parts_stop_mixing_images_together():
    parts = [Part("a", 3), Part("b", 2)]
    dataset, hyp = ShotsAndBase(parts), object()
    dataset.close_mosaic(hyp)
    assert parts[0].closed == parts[1].closed == [hyp]


# The sampler


@pytest.mark.parametrize(("batch", "base", "replayed"), [(8, 20, 4), (5, 20, 2), (8, 2, 4), (1, 20, 0), (6, 0, 0)])
def test_batches_are_half_shots_and_half_base_images(batch, base, replayed):
    sampler = AdaptSampler(7, base, batch, 9)
    drawn = np.array(list(sampler)).reshape(9, batch)
    assert len(sampler) == drawn.size
    assert (drawn[:, : batch - replayed] < 7).all() and (drawn[:, batch - replayed :] >= 7).all()
    assert drawn.min() >= 0 and drawn.max() < 7 + base
    for n, stream in ((7, drawn[:, : batch - replayed].ravel()), (base, drawn[:, batch - replayed :].ravel() - 7)):
        for start in range(0, len(stream), max(n, 1)):  # every image comes before any comes again
            part = stream[start : start + n].tolist()
            assert len(set(part)) == len(part)
            if len(part) == n:
                assert set(part) == set(range(n))


def test_epochs_depend_on_seed_epoch_and_rank_alone():
    def epochs(n=3, **values):
        sampler = AdaptSampler(7, 20, 6, 4, **values)
        return [list(sampler) for _ in range(n)]

    first = epochs()
    np.random.seed(5)
    torch.manual_seed(5)
    assert epochs() == first
    assert all(isinstance(i, int) for i in first[0])
    different = [*first, *epochs(seed=1), *epochs(rank=1)]
    assert len({tuple(x) for x in different}) == 9
    assert epochs(seed=1, rank=2) == epochs(seed=1, rank=2)


def test_closing_the_mosaic_skips_no_epoch_where_processes_load():
    sampler, other = AdaptSampler(7, 20, 6, 4), AdaptSampler(7, 20, 6, 4)
    expected = [list(other) for _ in range(3)]
    loader = InfiniteDataLoader(list(range(27)), batch_size=6, sampler=sampler, num_workers=2, prefetch_factor=4)
    try:
        seen = [torch.cat(list(loader)).tolist()]
        sampler.restart(1)
        loader.reset()  # as Ultralytics does when it closes the mosaic
        seen += [torch.cat(list(loader)).tolist()]
    finally:
        loader.close()
    assert seen == expected[:2]


def test_base_images_with_repeated_names_keep_their_indices():
    dataset = SimpleNamespace(labels=labels_of([0, 2], [1]))
    relabel(dataset, {0: "a", 1: "b", 2: "a"}, {0: "a", 1: "b", 2: "a", 3: "new"})
    assert [x["cls"].ravel().tolist() for x in dataset.labels] == [[0, 2], [1]]
    with pytest.raises(ValueError, match="called a, and not at the same indices"):
        relabel(SimpleNamespace(labels=labels_of([0])), {0: "a", 1: "b"}, {0: "a", 1: "b", 2: "a"})


@pytest.mark.parametrize("base", [0, 7])
def test_processes_share_the_images_of_a_step(base):
    """Two processes see together what one with their joint batch sees: as many steps, every image as often."""
    one = list(AdaptSampler(10, base, 8, 5, seed=3).draw(2))
    two = [list(AdaptSampler(10, base, 4, 5, seed=3, rank=r, processes=2).draw(2)) for r in (0, 1)]
    assert len(one) == len(two[0]) + len(two[1]) == 40
    for step in range(5):
        joint = [*two[0][4 * step : 4 * step + 4], *two[1][4 * step : 4 * step + 4]]
        assert sorted(joint) == sorted(one[8 * step : 8 * step + 8])
