"""The endless list of training episodes: seeded, grouped, balanced, resumable, never held-out."""

from collections import Counter

import pytest

from rove.envs.sampler import EpisodeSampler, repeated
from rove.errors import RoveError
from rove.types import EpisodeSpec


class Suite:
    name = "three"
    tasks = ("a", "b", "c")
    variants = {}
    vocabulary = ("a", "b", "c")

    def instruction(self, episode: EpisodeSpec) -> str:
        return episode.task

    def initial_states(self, task, split):
        return range(100) if split == "train" else range(1000, 1010)


def test_same_seed_same_episodes_and_another_seed_others():
    one, two, other = (EpisodeSampler(Suite(), seed) for seed in (1, 1, 2))
    taken = one.take(30)
    assert taken == two.take(10) + two.take(20)
    assert taken != other.take(30)


def test_tasks_are_seen_equally_often_and_only_in_train_states():
    taken = EpisodeSampler(Suite(), 1).take(300)
    assert set(Counter(e.task for e in taken).values()) == {100}
    assert all(e.initial_state in range(100) for e in taken)
    assert len({e.initial_state for e in taken}) > 50


def test_groups_share_task_and_state_and_differ_in_noise():
    taken = EpisodeSampler(Suite(), 1, group_size=4).take(12)
    for start in (0, 4, 8):
        group = taken[start : start + 4]
        assert len({(e.task, e.initial_state) for e in group}) == 1
        assert len({e.seed for e in group}) == 4


def test_cursor_is_the_whole_state():
    sampler = EpisodeSampler(Suite(), 1)
    sampler.take(7)
    resumed = EpisodeSampler(Suite(), 1)
    resumed.cursor = sampler.cursor
    assert resumed.take(5) == sampler.take(5)


def test_streams_draw_different_episodes():
    rollouts, demonstrations = (EpisodeSampler(Suite(), 1, stream=stream).take(60) for stream in (0, 1))
    shared = {(e.task, e.initial_state) for e in rollouts} & {
        (e.task, e.initial_state) for e in demonstrations
    }
    assert rollouts != demonstrations and len(shared) < 30


def test_a_task_that_is_emphasised_comes_up_that_much_more_often():
    taken = EpisodeSampler(Suite(), 1, emphasis=("b:3",)).take(500)
    assert Counter(episode.task for episode in taken) == {"a": 100, "b": 300, "c": 100}
    assert repeated(("put/a/b", "put/a/c", "pick/a"), ("put:2", "put/a/c:5")).count("put/a/c") == 5


@pytest.mark.parametrize("entry", ["b", "b:", "b:0", "b:1.5", ":3", "d:2"])
def test_an_emphasis_that_says_nothing_is_refused(entry):
    with pytest.raises(RoveError, match="emphasis"):
        EpisodeSampler(Suite(), 1, emphasis=(entry,))
