import pytest

from yolo_fewshot.data.episodes import EpisodeSampler
from yolo_fewshot.data.sampling import EpochSampler
from yolo_fewshot.data.shots_and_base import AdaptSampler

pytestmark = pytest.mark.oldest


class Numbers(EpochSampler):
    def draw(self, epoch):
        yield from (10 * epoch, 10 * epoch + 1)


def test_epochs_follow_one_another():
    sampler = Numbers(seed=3, rank=1)
    assert (sampler.seed, sampler.rank, sampler.epoch) == (3, 1, 0)
    assert [list(sampler) for _ in range(3)] == [[0, 1], [10, 11], [20, 21]]


def test_the_first_epoch_can_be_set_until_one_is_drawn():
    sampler = Numbers()
    sampler.set_epoch(4)
    sampler.set_epoch(2)  # the trainer announces every epoch, and the loader is ahead of it
    assert list(sampler) == [20, 21]
    sampler.set_epoch(0)
    assert list(sampler) == [30, 31]


def test_an_epoch_can_be_drawn_again():
    sampler = Numbers()
    drawn = [list(sampler) for _ in range(3)]
    sampler.restart(1)
    assert list(sampler) == drawn[1] and list(sampler) == drawn[2]


@pytest.mark.parametrize("sampler", [AdaptSampler, EpisodeSampler])
def test_both_stages_count_their_epochs_in_this_way(sampler):
    assert issubclass(sampler, EpochSampler)
    assert not {"__iter__", "set_epoch", "restart"} & vars(sampler).keys()
