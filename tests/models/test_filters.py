import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from models.data import Interactions, drop_duplicates, k_core

# Events of one user each, as (item, time); times are made to ascend.
SEQUENCES = st.lists(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=8), min_size=1)


def build(sequences, num_items=6):
    """Interactions whose raw ids and times differ from every number, so that a mix-up shows."""
    data = Interactions.from_sequences(
        [[item for item, _ in row] for row in sequences],
        num_items,
        user_ids=[f"u{i}" for i in range(len(sequences))],
        times=[sorted(time for _, time in row) for row in sequences],
    )
    return Interactions(
        data.items, data.offsets, num_items, data.user_ids, np.array(["", *"abcdef"[:num_items]]), data.times
    )


def events(data):
    """[(user id, item id, time)], in order."""
    users = np.repeat(data.user_ids, data.lengths).tolist()
    return list(zip(users, data.item_ids[data.items].tolist(), data.times.tolist(), strict=True))


class TestDuplicates:
    @hypothesis.given(SEQUENCES, st.sampled_from(["all", "exact", "first", "last"]))
    def test_against_a_dictionary(self, sequences, keep):
        data = build(sequences)
        given = events(data)
        key = {"exact": lambda e: e, "all": lambda e: None}.get(keep, lambda e: e[:2])
        kept = given
        if keep == "last":
            kept = [e for e in given if e is next(x for x in reversed(given) if key(x) == key(e))]
        elif keep != "all":
            kept = [e for i, e in enumerate(given) if key(e) not in map(key, given[:i])]
        found = drop_duplicates(data, keep)
        assert events(found) == kept
        assert found.num_items == data.num_items
        assert found.user_ids.tolist() == data.user_ids.tolist()

    def test_tells(self):
        data = build([[(1, 0), (1, 0), (2, 1), (1, 2)]])
        assert drop_duplicates(data).notes == ()
        assert drop_duplicates(data, "exact").notes == ("duplicates, exact kept: 1 interactions removed",)
        assert drop_duplicates(data, "last").notes == ("duplicates, last kept: 2 interactions removed",)
        assert [list(s) for s in drop_duplicates(data, "first")] == [[1, 2]]
        assert [list(s) for s in drop_duplicates(data, "last")] == [[2, 1]]

    def test_refuses(self):
        data = Interactions.from_sequences([[1, 1]])
        with pytest.raises(ValueError, match="exact compares times, and this data has only an order"):
            drop_duplicates(data, "exact")
        with pytest.raises(ValueError, match="duplicates must be one of all, exact, first, last, got 'no'"):
            drop_duplicates(data, "no")


class TestKCore:
    @hypothesis.given(SEQUENCES, st.integers(0, 4), st.integers(0, 4))
    def test_against_removing_one_by_one(self, sequences, user_min, item_min):
        data = build(sequences)
        left = events(data)
        while True:  # any order of removing leads to the same core: here one offender at a time, from the end
            users, items = [e[0] for e in left], [e[1] for e in left]
            bad = [e for e in left if users.count(e[0]) < user_min or items.count(e[1]) < item_min]
            if not bad:
                break
            side = 0 if users.count(bad[-1][0]) < user_min else 1
            left = [e for e in left if e[side] != bad[-1][side]]
        if not left:
            with pytest.raises(
                ValueError, match=r"nothing of .* remains; lower min_user_interactions or min_item_inter"
            ):
                k_core(data, min_user_interactions=user_min, min_item_interactions=item_min)
            return
        found = k_core(data, min_user_interactions=user_min, min_item_interactions=item_min)
        assert events(found) == left
        if len(left) < len(data):
            assert found.num_items == len({e[1] for e in left})
            assert found.num_users == len({e[0] for e in left})
            assert found.items.dtype == np.int32

    def test_rounds_and_what_went_are_told(self):
        # Item 3 has too few, then user 2, then item 2, then user 1: a chain.
        data = Interactions.from_sequences([[1, 2], [2, 3], [1, 4], [4, 1], [4, 1]], 9)
        found = k_core(data, min_user_interactions=2, min_item_interactions=2)
        assert found.notes == (
            "at least 2 interactions a user and 2 an item: removed 2 users, 2 items and 4 interactions in 3 rounds",
        )
        assert [list(s) for s in found] == [[1, 2], [2, 1], [2, 1]]
        assert found.item_ids.tolist() == [0, 1, 4]
        assert found.user_ids.tolist() == [3, 4, 5]

    def test_items_that_never_occur_have_fewer(self):
        data = Interactions.from_sequences([[1, 5], [5, 1]])
        assert k_core(data, min_item_interactions=1).item_ids.tolist() == [0, 1, 5]
        assert k_core(data, min_user_interactions=2).num_items == 5
        found = k_core(data, min_user_interactions=2, min_item_interactions=2)
        assert found.item_ids.tolist() == [0, 1, 5]
        assert [list(s) for s in found] == [[1, 2], [2, 1]]
        assert found.notes == ("at least 2 interactions a user and 2 an item: nothing had to be removed",)
        assert k_core(data) is data

    def test_refuses_negative_numbers(self):
        with pytest.raises(ValueError, match="min_item_interactions must be at least 0, got -1"):
            k_core(Interactions.from_sequences([[1]]), min_item_interactions=-1)


class TestInvariants:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"offsets": np.array([0, 3, 2, 4])}, "offsets must ascend from 0 to the number of interactions, 4"),
            ({"offsets": np.array([0, 2, 3])}, "offsets must ascend"),
            ({"offsets": np.array([1, 2, 4])}, "offsets must ascend"),
            ({"user_ids": np.array([1])}, "user_ids must hold one id for each of the 2 users, got 1"),
            ({"item_ids": np.array([1, 2, 3])}, "item_ids must hold 4 ids, one for padding and one an item, got 3"),
            ({"times": np.array([1, 2])}, "times must hold one time an interaction, 4, got 2"),
            ({"times": np.array([1, 2, 4, 3])}, "times must ascend inside each user, but user 2 has 3 behind 4"),
            ({"times": np.array([1, np.nan, 3, 4])}, "but user 1 has nan behind 1.0"),
        ],
    )
    def test_refuses(self, arguments, message):
        whole = {"items": np.array([1, 2, 3, 1], np.int32), "offsets": np.array([0, 2, 4]), "num_items": 3}
        assert len(Interactions(**whole, times=np.array([5, 5, 1, 1]))) == 4
        with pytest.raises(ValueError, match=message):
            Interactions(**whole | arguments)

    def test_statistics(self):
        data = Interactions.from_sequences([[1, 2, 3], [4]], 1000)
        assert str(data) == "2 users, 1,000 items, 4 interactions (0.20% of all pairs, 2.0 a user)"
