import random
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from ultralytics.cfg import get_cfg
from ultralytics.data.augment import Albumentations
from ultralytics.data.dataset import YOLODataset

from yolo_fewshot.data.episodes import Draw, EpisodeSampler, EpisodicDataset, turn_image

pytestmark = pytest.mark.oldest


def make_labels(per_image):
    """Labels as Ultralytics holds them, from a list of the classes in every image."""
    return [{"cls": np.array(c, dtype=np.float32).reshape(-1, 1)} for c in per_image]


def random_labels(images=200, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    return make_labels([rng.integers(0, classes, rng.integers(0, 5)) for _ in range(images)])


NAMES = {i: f"class{i}" for i in range(10)}


@pytest.mark.parametrize(("n_way", "k_shot", "n_query"), [(2, 1, 1), (5, 3, 2), (10, 1, 4)])
def test_counts_are_exact_and_support_and_query_disjoint(n_way, k_shot, n_query):
    labels = random_labels()
    sampler = EpisodeSampler(labels, NAMES, n_way, k_shot, n_query, episodes=30)
    draws = list(sampler)
    size = n_way * (k_shot + n_query)
    assert len(draws) == len(sampler) == 30 * size
    for t in range(30):
        episode = draws[t * size : (t + 1) * size]
        support, query = episode[: n_way * k_shot], episode[n_way * k_shot :]
        assert all(d.support for d in support) and not any(d.support for d in query)
        assert sorted(Counter(d.way for d in support).values()) == [k_shot] * n_way
        assert sorted(Counter(d.way for d in query).values()) == [n_query] * n_way
        assert {d.way for d in support} == {d.way for d in query}
        assert not {d.image for d in support} & {d.image for d in query}
        for d in episode:
            assert d.way in labels[d.image]["cls"]


def test_an_image_that_is_listed_again_is_not_drawn():
    labels = [x | {"im_file": f"{i}.jpg"} for i, x in enumerate(random_labels())]
    once = list(EpisodeSampler(labels, NAMES, 8, 1, 1, episodes=50))
    again = list(EpisodeSampler(labels + labels[::-1], NAMES, 8, 1, 1, episodes=50))
    assert again == once and len({d.image for d in again}) > 100


def test_no_image_repeats_where_a_class_has_enough():
    labels = make_labels([[i % 4] for i in range(400)])
    sampler = EpisodeSampler(labels, NAMES, 4, 5, 5, episodes=20)
    for t in range(20):
        indices = [d.image for d in sampler.episode(0, t)]
        assert len(set(indices)) == len(indices)


def test_same_seed_same_episodes_and_others_differ():
    def draw(**kwargs):
        sampler = EpisodeSampler(random_labels(), NAMES, 3, 1, 1, episodes=5, **kwargs)
        return list(sampler)

    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=1) != draw(seed=2)
    assert draw(seed=1, rank=0) != draw(seed=1, rank=1)


def test_epochs_differ_and_resume_continues_where_it_stopped():
    labels = random_labels()
    whole = EpisodeSampler(labels, NAMES, 3, 1, 1, episodes=5)
    epochs = [list(whole) for _ in range(4)]
    assert all(epochs[i] != epochs[j] for i in range(4) for j in range(i))
    resumed = EpisodeSampler(labels, NAMES, 3, 1, 1, episodes=5)
    resumed.set_epoch(2)
    assert list(resumed) == epochs[2]
    resumed.set_epoch(3)  # what distributed training announces
    assert list(resumed) == epochs[3]


def test_an_announced_epoch_does_not_disturb_prefetching():
    sampler = EpisodeSampler(random_labels(), NAMES, 3, 1, 1, episodes=2)
    first, second = list(sampler), list(sampler)  # a loader has already fetched epoch 1
    sampler.set_epoch(1)
    third = list(sampler)
    assert len({str(first), str(second), str(third)}) == 3


def test_ranks_draw_their_own_episodes_from_the_same_classes():
    labels = random_labels()
    draws = [list(EpisodeSampler(labels, NAMES, 3, 1, 1, episodes=50, rank=r)) for r in range(4)]
    assert len({str(d) for d in draws}) == 4
    assert all({x.way for x in d} == set(range(10)) for d in draws)


def test_every_class_is_drawn_about_equally_often():
    labels = make_labels([[0]] * 300 + [[c] for c in range(1, 10) for _ in range(10)])  # class 0 is frequent
    sampler = EpisodeSampler(labels, NAMES, 2, 1, 1, episodes=2000)
    counts = Counter(d.way for d in sampler if d.support)
    assert min(counts.values()) > 0.8 * max(counts.values())


def test_too_few_classes_is_an_error_that_names_those_left_out():
    labels = make_labels([[0], [0], [0], [1], [1], [1], [2], [2]])
    with pytest.raises(ValueError, match=r"n_way=3.*3 images \(k_shot \+ 1\).*class2 \(2\).*n_way=2"):
        EpisodeSampler(labels, {i: f"class{i}" for i in range(3)}, 3, 2, 1, episodes=1)


def test_classes_with_too_few_images_are_left_out_with_a_warning(caplog):
    labels = make_labels([[0], [0], [1], [1], [2]])
    import logging

    logging.getLogger("ultralytics").addHandler(caplog.handler)
    try:
        sampler = EpisodeSampler(labels, {i: f"class{i}" for i in range(4)}, 2, 1, 1, episodes=50)
    finally:
        logging.getLogger("ultralytics").removeHandler(caplog.handler)
    assert "class2 (1)" in caplog.text and "class3 (0)" in caplog.text
    assert {d.way for d in sampler} == {0, 1}


@pytest.mark.parametrize("key", ["n_way", "k_shot", "n_query", "episodes"])
def test_counts_below_one_are_errors(key):
    counts = {"n_way": 2, "k_shot": 1, "n_query": 1, "episodes": 1, key: 0}
    with pytest.raises(ValueError, match=f"'{key}=0' is an invalid value"):
        EpisodeSampler(random_labels(), NAMES, **counts)


def test_empty_train_split_is_an_error():
    with pytest.raises(ValueError, match="n_way=2"):
        EpisodeSampler([], NAMES, 2, 1, 1, episodes=1)


def test_query_images_repeat_where_a_class_has_too_few():
    labels = make_labels([[0]] * 3 + [[1]] * 3)
    episode = EpisodeSampler(labels, NAMES, 2, 1, 5, episodes=1).episode(0, 0)
    query = [d for d in episode if not d.support]
    assert len(query) == 10 and len({d.image for d in query}) == 4


def test_images_that_show_every_class_can_be_shared_by_ways():
    labels = make_labels([[0, 1, 2, 3]] * 2)  # one support and one query image is all there is
    episode = EpisodeSampler(labels, {i: str(i) for i in range(4)}, 4, 1, 1, episodes=1).episode(0, 0)
    assert len({d.image for d in episode if d.support}) == 1
    assert len({d.image for d in episode}) == 2


def test_impossible_episodes_are_an_error_before_training():
    labels = make_labels([[0, 2], [0, 1], [1, 2]])  # whatever is support, one class has no query image left
    with pytest.raises(ValueError, match="divided into support and query"):
        EpisodeSampler(labels, {i: str(i) for i in range(3)}, 3, 1, 1, episodes=1)


def test_cost_of_an_episode_does_not_grow_with_the_data():
    def cost(n):
        sampler = EpisodeSampler(make_labels([[i % 10] for i in range(n)]), NAMES, 5, 1, 1, episodes=1)
        calls = []
        images = sampler.images

        class Counting:
            def __getitem__(self, key):
                got = images[key]
                calls.append(got.size)
                return got

        sampler.images = Counting()
        for t in range(20):
            sampler.episode(0, t)
        return sum(calls)

    assert cost(100_000) == cost(2_000)


@pytest.fixture
def yolo_dataset(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for i in range(12):
        cv2.imwrite(str(tmp_path / f"images/{i:02}.png"), rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        (tmp_path / f"labels/{i:02}.txt").write_text(f"{i % 3} 0.5 0.5 0.4 0.4\n")
    data = {"names": {0: "a", 1: "b", 2: "c"}, "nc": 3, "channels": 3}
    hyp = get_cfg(overrides={"mosaic": 0.0, "hsv_v": 0.9, "degrees": 20.0})
    return YOLODataset(img_path=str(tmp_path / "images"), imgsz=64, hyp=hyp, data=data, batch_size=4)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_episodes_are_turned_as_a_whole_and_draw_the_same_images(share):
    labels = random_labels()
    plain = EpisodeSampler(labels, NAMES, 3, 1, 1, episodes=400)
    sampler = EpisodeSampler(labels, NAMES, 3, 1, 1, episodes=400, turned=share)
    episodes = [sampler.episode(0, t) for t in range(400)]
    turns = [{d.turn for d in episode} for episode in episodes]
    assert all(len(t) == 1 for t in turns)
    counts = Counter(t for turn in turns for t in turn)
    assert 1 - counts[0] / 400 == pytest.approx(share, abs=0.08)
    assert set(counts) <= set(range(8)) and (not share or min(counts[t] for t in range(1, 8)) > 10)
    assert [[d._replace(turn=0) for d in e] for e in episodes] == [plain.episode(0, t) for t in range(400)]


def test_boxes_turn_with_their_image():
    img = torch.zeros(1, 20, 20, dtype=torch.uint8)
    img[0, 2:6, 3:13] = 100  # two objects: one wide and near the upper left corner, one tall and at the right edge
    img[0, 10:18, 18:20] = 200
    boxes = torch.tensor([[8.0, 4.0, 10.0, 4.0], [19.0, 14.0, 2.0, 8.0]]) / 20
    turned = [turn_image({"img": img, "bboxes": boxes, "cls": 7}, t) for t in range(8)]
    assert torch.equal(turned[0]["img"], img) and torch.equal(turned[0]["bboxes"], boxes)
    assert torch.equal(turned[1]["img"][0].float(), torch.from_numpy(np.rot90(img[0].float().numpy()).copy()))
    assert torch.equal(turned[4]["img"][0], torch.from_numpy(np.fliplr(img[0].numpy()).copy()))
    assert len({x["img"].numpy().tobytes() for x in turned}) == 8
    for x in turned:
        assert x["cls"] == 7
        for value, (cx, cy, w, h) in zip((100, 200), (x["bboxes"] * 20).tolist()):
            rows, columns = np.nonzero(x["img"][0].numpy() == value)
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert found == pytest.approx([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], abs=1e-4)
    empty = turn_image({"img": img, "bboxes": boxes[:0]}, 5)
    assert empty["bboxes"].shape == (0, 4)


def test_a_turned_batch_says_so(yolo_dataset):
    dataset = EpisodicDataset(yolo_dataset)
    draws = [Draw(0, 0, True, 5), Draw(1, 1, False, 6)]
    plain = dataset.collate_fn([dataset[d] for d in draws])
    turned = dataset.collate_fn([dataset[d._replace(turn=6)] for d in draws])
    assert plain["turned"] is False and turned["turned"] is True
    for i in range(2):
        expected = turn_image({"img": plain["img"][i], "bboxes": plain["bboxes"][plain["batch_idx"] == i]}, 6)
        assert torch.equal(turned["img"][i], expected["img"])
        torch.testing.assert_close(turned["bboxes"][turned["batch_idx"] == i], expected["bboxes"])


def test_batches_have_the_support_mask_and_the_drawn_classes(yolo_dataset):
    dataset = EpisodicDataset(yolo_dataset)
    sampler = EpisodeSampler(dataset.labels, yolo_dataset.data["names"], 3, 2, 1, episodes=2)
    loader = DataLoader(dataset, batch_size=sampler.episode_size, sampler=sampler, collate_fn=dataset.collate_fn)
    batch = next(iter(loader))
    assert batch["img"].shape == (9, 3, 64, 64)
    assert batch["support"].tolist() == [True] * 6 + [False] * 3
    assert batch["way"].dtype == batch["query"].dtype == torch.long and batch["query"].tolist() == [6, 7, 8]
    drawn = sampler.episode(0, 0)
    assert batch["way"].tolist() == [d.way for d in drawn]
    assert [batch["im_file"][i][-6:-4] for i in range(9)] == [f"{d.image:02}" for d in drawn]


def test_augmentation_does_not_depend_on_loader_processes(yolo_dataset):
    dataset = EpisodicDataset(yolo_dataset)

    def batches(workers):
        sampler = EpisodeSampler(dataset.labels, yolo_dataset.data["names"], 3, 1, 1, episodes=3)
        loader = DataLoader(dataset, batch_size=6, sampler=sampler, collate_fn=dataset.collate_fn, num_workers=workers)
        return torch.stack([b["img"] for b in loader])

    np.random.seed(99)
    here = batches(0)
    np.random.seed(1)
    assert torch.equal(here, batches(2))
    assert not torch.equal(here[0], here[1])


class Noise:
    """A transform of albumentations 1.4.21 or newer: it has a random state of its own."""

    def __init__(self):
        self.set_random_seed(0)

    def set_random_seed(self, seed):
        self.seed, self.rng = seed, np.random.default_rng(seed)

    def __call__(self, image):
        return {"image": self.rng.integers(0, 255, image.shape, dtype=np.uint8)}


@pytest.fixture
def noisy(yolo_dataset):
    """Images of noise only, drawn by albumentations."""
    (transform,) = (x for x in yolo_dataset.transforms.transforms if isinstance(x, Albumentations))
    transform.transform, transform.contains_spatial, transform.p = Noise(), False, 1.0
    return EpisodicDataset(yolo_dataset)


def test_albumentations_draws_from_the_seed_of_the_image_alone(noisy):
    draws = [Draw(0, 0, True, 5), Draw(1, 1, True, 5), Draw(0, 0, True, 6)]
    first = [noisy[d]["img"] for d in draws]
    torch.manual_seed(7)  # another process
    again = [noisy[d]["img"] for d in (draws[2], draws[0], draws[0], draws[1])]
    for a, b in zip([first[2], first[0], first[0], first[1]], again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], first[2])


def test_loading_an_image_leaves_the_random_state_of_the_process_alone(noisy):
    def numbers():
        return random.random(), np.random.rand(), torch.rand(1).item(), torch.initial_seed()

    def seed():
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    seed()
    expected = [numbers() for _ in range(2)]
    seed()
    found = [numbers()]
    noisy[Draw(2, 2, False, 11)]
    with pytest.raises(IndexError):
        noisy[Draw(99, 2, False, 11)]
    assert [*found, numbers()] == expected
