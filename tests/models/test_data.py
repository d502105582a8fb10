import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from models.data import Interactions, drifting_interests, leave_one_out, read_sequences
from models.feeds import NegativeSampler, pack

BEAUTY = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "beauty.txt"


@pytest.fixture
def interactions():
    return drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3)


def write(tmp_path, text, mode="w"):
    path = tmp_path / "data.txt"
    path.write_bytes(text) if mode == "wb" else path.write_text(text)
    return path


class TestReadSequences:
    def test_reads_users_in_file_order(self, tmp_path):
        data = read_sequences(write(tmp_path, "7 3 1 2\n\n2 5 5\n"))
        assert [list(sequence) for sequence in data] == [[3, 1, 2], [5, 5]]
        assert data.num_items == 5
        assert data.num_users == 2
        assert data.items.dtype == np.int32

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "holds no interactions"),
            ("\n  \n", "holds no interactions"),
            ("1 2 3\n2 4 x 5\n", "line 2: 'x' is no integer id"),
            ("1 2 3\n2 4 1.5\n", "line 2: '1.5' is no integer id"),
            ("1 2 3\n2\n", "line 2: user 2 has no items"),
            ("1 2 0 3\n", "line 1: the item id 0 is smaller than 1"),
            ("1 2 -4 3\n", "line 1: the item id -4 is smaller than 1"),
            ("1 2 3\n\n1 4 5\n", "line 3: user 1 has a line already, 1"),
            ("1 2 4294967296\n", "line 1: the item id 4294967296 does not fit 32 bits"),
            ("1 2 99999999999999999999\n", "line 1: '99999999999999999999' is no integer id"),
        ],
    )
    def test_names_the_malformed_line(self, tmp_path, text, message):
        with pytest.raises(ValueError, match=message):
            read_sequences(write(tmp_path, text))

    def test_refuses_what_is_no_text(self, tmp_path):
        with pytest.raises(ValueError, match="is not UTF-8 text"):
            read_sequences(write(tmp_path, b"1 2 3\n2 \xff\xfe 3\n", "wb"))

    def test_refuses_what_is_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read_sequences(tmp_path / "none.txt")
        with pytest.raises(FileNotFoundError, match="is a folder"):
            read_sequences(tmp_path)

    @pytest.mark.skipif(not BEAUTY.exists(), reason="needs the real data beside the project")
    def test_counts_of_the_real_file(self):
        data = read_sequences(BEAUTY)
        assert (data.num_users, data.num_items, len(data)) == (22_363, 12_101, 198_502)


class TestInteractions:
    def test_times_of_other_lengths_are_refused(self):
        with pytest.raises(ValueError, match="times must hold one time for each interaction of each user"):
            Interactions.from_sequences([[1, 2], [3]], times=[[1], [2, 3]])

    def test_density_counts_repetitions_once(self):
        assert "3 interactions (100.00% of all pairs" in str(Interactions.from_sequences([[1, 1, 1]]))

    def test_refuses_ids_outside_the_catalogue(self):
        with pytest.raises(ValueError, match="item id 9, but ids must lie between 1 and 8"):
            Interactions.from_sequences([[1, 9]], num_items=8)
        with pytest.raises(ValueError, match="item id 0"):
            Interactions.from_sequences([[1, 0]])
        with pytest.raises(ValueError, match="no interaction"):
            Interactions.from_sequences([])

    def test_leave_one_out(self):
        split = leave_one_out(Interactions.from_sequences([[1, 2, 3], [4, 5, 6, 7, 8]]))
        assert [list(s) for s in split.train] == [[1], [4, 5, 6]]
        assert [list(s) for s in split.test_history] == [[1, 2], [4, 5, 6, 7]]
        assert split.validation_history is split.train
        assert split.validation.tolist() == [2, 7]
        assert split.test.tolist() == [3, 8]
        assert split.train.num_items == 8

    def test_leave_one_out_needs_three(self):
        with pytest.raises(ValueError, match="user 2 of 3 has 2 interactions"):
            leave_one_out(Interactions.from_sequences([[1, 2, 3], [4, 5], [6]]))


class TestDriftingInterests:
    def test_is_the_same_in_another_process(self):
        code = "from models.data import drifting_interests as d; import zlib; print(zlib.crc32(d(num_users=50).items))"
        out = [
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            for _ in range(2)
        ]
        assert out[0] == out[1] != ""

    def test_shape_and_seed(self, interactions):
        assert interactions.num_users == 60
        assert interactions.lengths.min() >= 5
        assert all(len(set(s.tolist())) == len(s) for s in interactions)
        other = drifting_interests(num_users=60, num_items=40, num_groups=5, seed=4)
        assert len(other) != len(interactions) or (other.items != interactions.items).any()

    def test_neighbours_in_time_share_groups(self):
        """The structure is in the order: transitions repeat more often than between shuffled items."""

        def repeated_transitions(sequences):
            pairs = [pair for s in sequences for pair in itertools.pairwise(s.tolist())]
            return len(pairs) - len(set(pairs))

        data = drifting_interests()
        shuffled = np.split(np.random.default_rng(0).permutation(data.items), data.offsets[1:-1])
        assert repeated_transitions(data) > 1.5 * repeated_transitions(shuffled)

    def test_popularity_is_skewed(self):
        data = drifting_interests()
        counts = np.sort(np.bincount(data.items, minlength=data.num_items + 1)[1:])[::-1]
        assert counts[:100].sum() > 0.25 * counts.sum()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_groups": 41}, "num_groups must lie between 1 and num_items=40, got 41"),
            ({"mean_length": 5}, "mean_length must be more than 5"),
            ({"num_users": 0}, "num_users must be at least 1"),
            ({"stay_probability": 1.5}, r"stay_probability must lie in \[0, 1\], got 1.5"),
            ({"stay_probability": 1, "noise_probability": 0}, "noise_probability must be larger than 0 where"),
        ],
    )
    def test_refuses(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            drifting_interests(**({"num_items": 40, "num_groups": 5} | arguments))


def tokens_by_user(packed):
    """user -> list of (input, position, padding, target) in the order of positions; checks that segments are whole."""
    found = {}
    for index in range(packed.num_batches):
        batch = jax.tree.map(np.asarray, packed.batch(index))
        for row in range(packed.rows):
            for segment in set(batch.segments[row]) - {0}:
                where = np.flatnonzero(batch.segments[row] == segment)
                assert (np.diff(where) == 1).all()
                users = set(batch.users[row, where])
                assert len(users) == 1
                user = users.pop()
                assert user not in found
                found[user] = [
                    tuple(int(field[row, i]) for field in (batch.inputs, batch.positions, batch.padding, batch.targets))
                    for i in where
                ]
        blank = batch.segments == 0
        assert not any(field[blank].any() for field in batch)
    return found


@pytest.mark.parametrize(("ids", "shown"), [([[1.9, 2], [3]], "1.9"), ([["a", "b"]], "'a'"), ([[1], [True]], "True")])
def test_sequences_of_what_is_no_number(ids, shown):
    with pytest.raises(ValueError, match=f"sequences hold {shown}; ids must be whole numbers: number the items from 1"):
        Interactions.from_sequences(ids)


def test_sequences_of_whole_floats():
    assert Interactions.from_sequences([[1.0, 3.0], np.array([2], np.uint8), []]).items.tolist() == [1, 3, 2]


class TestPack:
    @pytest.mark.parametrize("max_length", [1, 4, 7, 100])
    @pytest.mark.parametrize("shuffle", [False, True])
    def test_every_token_once(self, interactions, max_length, shuffle):
        packed = pack(interactions, max_length=max_length, batch_size=13)
        if shuffle:
            packed = packed.shuffle(jax.random.key(1))
        expected = {}
        for user, sequence in enumerate(interactions):
            inputs, targets = sequence[:-1][-max_length:], sequence[1:][-max_length:]
            padding = max_length - len(inputs)
            expected[user] = [
                (item, padding + i, padding, target)
                for i, (item, target) in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True))
            ]
        assert tokens_by_user(packed) == expected
        assert packed.num_tokens == sum(map(len, expected.values()))
        assert packed.num_batches == -(-60 // 13)

    @pytest.mark.parametrize(
        ("batch_size", "lengths"),
        [(size, [30, *np.random.default_rng(0).integers(2, 8, size=70)]) for size in (1, 3, 5)]
        + [(13, [31] + [9] * 3900)],  # four users a row, 3.25 rows a batch
    )
    @pytest.mark.parametrize("count_targets", [False, True])
    def test_no_batch_is_empty_and_as_many_as_asked_for(self, batch_size, lengths, count_targets):
        rng = np.random.default_rng(0)
        packed = pack(
            Interactions.from_sequences([rng.integers(1, 9, size=n) for n in lengths]),
            max_length=30,
            batch_size=batch_size,
            count_targets=count_targets,
        )
        counted = packed.num_tokens if count_targets else len(lengths)
        num_rows = int((np.asarray(packed.slot)[:, 0] >= 0).sum())
        assert packed.num_batches == min(-(-counted // batch_size), num_rows)
        orders = set()
        for seed in range(5):
            slots = np.asarray(packed.shuffle(jax.random.key(seed)).slot).reshape(packed.num_batches, packed.rows, -1)
            assert (slots[..., 0].max(axis=1) >= 0).all()
            assert np.ptp((slots[..., 0] >= 0).sum(axis=1)) <= 1  # rows are spread evenly
            every = slots[slots >= 0]
            assert sorted(set(every.tolist())) == list(range(len(lengths)))
            assert len(every) == packed.num_tokens
            orders.add(tuple(slots[:, 0, 0].tolist()))
        assert len(orders) == 5

    @pytest.mark.parametrize("max_length", [1, 2, 3, 7, 8])
    def test_windows_have_each_item_as_target_once(self, max_length):
        """Every item but the first, after the newest ``max_length // 2`` items before it at least."""
        rng = np.random.default_rng(4)
        data = Interactions.from_sequences([rng.permutation(99)[:n] + 1 for n in (*range(2, 41), 3, 3, 17)])
        packed = pack(data, max_length=max_length, batch_size=5, count_targets=True, windows=True)
        found = {}
        for index in range(packed.num_batches):
            batch = jax.tree.map(np.asarray, packed.shuffle(jax.random.key(2)).batch(index))
            for row in range(len(batch.inputs)):
                for slot in set(batch.segments[row].tolist()) - {0}:
                    (where,) = np.nonzero(batch.segments[row] == slot)
                    inputs, targets = batch.inputs[row][where].tolist(), batch.targets[row][where].tolist()
                    assert len(inputs) <= max_length
                    user = int(batch.users[row][where[0]])
                    for place, target in enumerate(targets):
                        if target:
                            found.setdefault((user, target), []).append(inputs[: place + 1])
        sequences = [sequence.tolist() for sequence in data]
        expected = {(user, item) for user, sequence in enumerate(sequences) for item in sequence[1:]}
        assert found.keys() == expected
        for (user, target), (before,) in found.items():
            history = sequences[user][: sequences[user].index(target)]
            assert before == history[-len(before) :]
            assert len(before) >= min(len(history), max(1, max_length // 2))

    def test_shuffle_changes_company_and_order(self, interactions):
        packed = pack(interactions, max_length=7, batch_size=13)
        companies = []
        for seed in range(2):
            batch = packed.shuffle(jax.random.key(seed)).batch(0)
            companies.append(set(np.asarray(batch.users)[np.asarray(batch.segments) > 0].tolist()))
        assert companies[0] != companies[1]

    def test_histories_end_with_the_newest_item(self, interactions):
        packed = pack(interactions, max_length=6, batch_size=60, with_targets=False)
        tokens = tokens_by_user(packed)
        for user, sequence in enumerate(interactions):
            assert [t[0] for t in tokens[user]] == sequence[-6:].tolist()
            assert tokens[user][-1][1] == 5

    def test_short_users_are_left_out_of_training(self):
        data = Interactions.from_sequences([[1], [2, 3], [4]])
        assert set(tokens_by_user(pack(data, max_length=5, batch_size=2))) == {1}
        with pytest.raises(ValueError, match="no user has two interactions"):
            pack(Interactions.from_sequences([[1], [2]]), max_length=5, batch_size=2)

    def test_rows_are_well_filled(self):
        data = drifting_interests()
        packed = pack(data, max_length=50, batch_size=128)
        assert packed.num_tokens / packed.slot.size > 0.9

    @pytest.mark.parametrize("name", ["max_length", "batch_size"])
    def test_refuses_numbers_below_one(self, interactions, name):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            pack(interactions, **({"max_length": 5, "batch_size": 5} | {name: 0}))


class TestNegativeSampler:
    def test_draws_unseen_items_uniformly(self):
        data = Interactions.from_sequences([[3, 1, 7, 3, 12], [12, 11, 10], [5]], num_items=12)
        unseen = NegativeSampler.from_interactions(data)
        draws = np.asarray(unseen.sample(jax.random.key(0), jnp.repeat(jnp.arange(3), 20_000))).reshape(3, -1)
        for user, sequence in enumerate(data):
            allowed = sorted(set(range(1, 13)) - set(sequence.tolist()))
            counts = np.bincount(draws[user], minlength=13)
            assert np.flatnonzero(counts).tolist() == allowed
            assert scipy.stats.chisquare(counts[allowed]).pvalue > 1e-3

    def test_long_lists(self):
        sequence = np.setdiff1d(np.arange(1, 3001), [1, 1500, 3000])
        unseen = NegativeSampler.from_interactions(Interactions.from_sequences([sequence], num_items=3000))
        draws = unseen.sample(jax.random.key(0), jnp.zeros((10, 30), jnp.int32))
        assert draws.shape == (10, 30)
        assert set(np.asarray(draws).ravel().tolist()) == {1, 1500, 3000}

    def test_refuses_users_who_know_everything(self):
        with pytest.raises(ValueError, match="user 2 has interacted with all 3 items"):
            NegativeSampler.from_interactions(Interactions.from_sequences([[1], [1, 2, 3]]))
