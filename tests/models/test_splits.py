import bisect
import datetime
import json
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from models.__main__ import main
from models.architectures.registry import make_config
from models.architectures.sasrec import SASRec
from models.config import SourceConfig
from models.data import (
    Interactions,
    cold_start,
    global_time,
    leave_one_out,
    make_split,
    of_known_users,
    split_interactions,
)
from models.data.splits import seconds_since_1970
from models.evaluation.ranking import FullRanking
from models.feeds import NegativeSampler, pack

# user -> [(time, item)]: in turn with both targets, without history, with a test target only, with times at the cuts.
USERS = {
    "a": [(1, 1), (2, 2), (10, 3), (11, 4), (20, 5), (30, 1)],
    "b": [(12, 1), (21, 2)],
    "c": [(3, 4), (25, 6)],
    "d": [(9, 5), (10, 6), (19, 1), (20, 2)],
    "e": [(22, 1), (23, 2)],
    "f": [(5, 1), (6, 2)],
}


def build(users):
    return Interactions.from_sequences(
        [[item for _, item in events] for events in users.values()],
        user_ids=list(users),
        times=[[time for time, _ in events] for events in users.values()],
    )


def as_dict(history, targets=None):
    rows = {user: row.tolist() for user, row in zip(history.user_ids.tolist(), history, strict=True)}
    return rows if targets is None else {u: (r, t) for (u, r), t in zip(rows.items(), targets.tolist(), strict=True)}


def by_hand(users, begin, end):
    """Per user the items before the cut and the first item behind it, by going through the list."""
    found = {}
    for user, events in users.items():
        behind = [(time, item) for time, item in events if time >= begin]
        before = [item for time, item in events if time < begin]
        if before and behind and behind[0][0] < end:
            found[user] = (before, behind[0][1])
    return found


class TestColdStart:
    def split(self, share=0.25, seed=0):
        rng = np.random.default_rng(seed)
        data = Interactions.from_sequences([rng.permutation(20)[:8] + 1 for _ in range(50)], num_items=20)
        return leave_one_out(data), split_interactions(data, SourceConfig(cold_items=share))

    def test_cold_items_are_predicted_and_never_seen(self):
        whole, split = self.split()
        cold = set(range(1, 21)) - set(split.train.items.tolist())
        assert len(cold) == 5
        assert (
            split.protocol == "leave-one-out; 5 cold items without training interactions, and only they are predicted"
        )
        for name in ("validation", "test"):
            before = as_dict(getattr(whole, f"{name}_history"), getattr(whole, name))
            after = as_dict(getattr(split, f"{name}_history"), getattr(split, name))
            expected = {u: ([x for x in row if x not in cold], t) for u, (row, t) in before.items() if t in cold}
            assert after == expected
            assert len(after) > 5
        assert as_dict(split.train) == {u: [x for x in row if x not in cold] for u, row in as_dict(whole.train).items()}

    def test_only_users_of_the_training_part_are_asked(self):
        rng = np.random.default_rng(0)
        data = Interactions.from_sequences([rng.permutation(20)[:3] + 1 for _ in range(200)], num_items=20)
        split = cold_start(leave_one_out(data), 0.25)
        known = set(split.train.user_ids.tolist())
        assert len(known) < 200  # the only item of the others is cold
        for history in (split.validation_history, split.test_history):
            assert set(history.user_ids.tolist()) <= known

    def test_the_same_items_in_every_run_on_a_catalogue(self):
        (_, one), (_, other) = self.split(seed=1), self.split(seed=2)
        assert set(one.train.items.tolist()) == set(other.train.items.tolist())
        fewer = set(self.split(share=0.1)[1].train.items.tolist())
        assert set(one.train.items.tolist()) < fewer

    def test_nothing_to_predict_or_to_train_on(self):
        data = Interactions.from_sequences([[1, 2, 3], [2, 3, 1]], num_items=1000)
        with pytest.raises(ValueError, match="none of 10 cold items is anybody's validation item; give a larger share"):
            cold_start(leave_one_out(data), 0.01)
        with pytest.raises(ValueError, match="cold_items: "):
            cold_start(leave_one_out(data), 0.999)


class TestGlobalTime:
    def test_small(self):
        split = global_time(build(USERS), times=(10, 20))
        assert as_dict(split.train) == {"a": [1, 2], "c": [4], "d": [5], "f": [1, 2]}
        assert as_dict(split.validation_history, split.validation) == {"a": ([1, 2], 3), "d": ([5], 6)}
        assert as_dict(split.test_history, split.test) == {
            "a": ([1, 2, 3, 4], 5),
            "b": ([1], 2),
            "c": ([4], 6),
            "d": ([5, 6, 1], 2),
        }
        assert split.protocol == "global-time split at 10 and 20, each user's first item behind the cut"
        parts = [split.train, split.validation_history, split.test_history]
        assert {part.num_items for part in parts} == {6}
        assert all((part.times < cut).all() for part, cut in zip(parts, [10, 10, 20], strict=True))

    def test_users_that_a_table_does_not_know(self):
        split = global_time(build(USERS), times=(10, 20))
        known = of_known_users(split, split.train.user_ids)
        assert as_dict(known.validation_history, known.validation) == {"a": ([1, 2], 3), "d": ([5], 6)}
        assert list(as_dict(known.test_history, known.test)) == ["a", "c", "d"]
        assert (
            known.protocol == f"{split.protocol}; 0 validation and 1 test users without training interactions left out"
        )
        assert of_known_users(known, split.train.user_ids) is known
        with pytest.raises(ValueError, match="split: no validation user has an interaction to train on"):
            of_known_users(split, np.array(["b"]))
        tested = of_known_users(split, np.array(["c"]), trained_on=False)
        assert list(as_dict(tested.test_history, tested.test)) == ["c"]
        assert tested.protocol == f"{split.protocol}; 3 test users that the model does not know left out"
        with pytest.raises(ValueError, match="data: the model, which has a table of users, knows none of the test"):
            of_known_users(split, np.array(["x"]), trained_on=False)

    @hypothesis.given(
        st.dictionaries(
            st.integers(),
            st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5)), min_size=1, max_size=6),
            min_size=1,
        ),
        st.integers(0, 12),
        st.integers(0, 12),
    )
    def test_against_lists(self, users, validation_cut, test_cut):
        users = {user: sorted(events, key=lambda event: event[0]) for user, events in users.items()}
        validation, test = by_hand(users, validation_cut, test_cut), by_hand(users, test_cut, math.inf)
        train = {u: kept for u, events in users.items() if (kept := [i for t, i in events if t < validation_cut])}
        if validation_cut >= test_cut or not (validation and test and train):
            with pytest.raises(ValueError, match=r"^split: "):
                global_time(build(users), times=(validation_cut, test_cut))
            return
        split = global_time(build(users), times=(validation_cut, test_cut))
        assert as_dict(split.train) == train
        assert as_dict(split.validation_history, split.validation) == validation
        assert as_dict(split.test_history, split.test) == test

    @pytest.mark.parametrize("quantiles", [(0.8, 0.9), (0.5, 0.75), (0.01, 0.5)])
    def test_quantiles(self, quantiles):
        rng = np.random.default_rng(0)
        users = {
            u: [(t, int(rng.integers(1, 50))) for t in sorted(rng.integers(0, 500, 30).tolist())] for u in range(60)
        }
        everything = sorted(t for events in users.values() for t, _ in events)
        split = global_time(build(users), quantiles=quantiles)
        cuts = [everything[int(q * len(everything))] for q in quantiles]
        assert len(split.train) == bisect.bisect_left(everything, cuts[0]) <= quantiles[0] * len(everything)
        assert as_dict(split.test_history, split.test) == by_hand(users, cuts[1], math.inf)

    def test_dates(self):
        def day(text):
            return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp()

        days = ["2001-01-01", "2001-06-01", "2001-12-31"]
        data = build({"a": [(day(text), i) for i, text in enumerate(days, start=1)]})
        split = global_time(data, times=("2001-05-31T23:59:59", "2001-12-31"))
        assert as_dict(split.test_history, split.test) == {"a": ([1, 2], 3)}
        assert seconds_since_1970("1970-01-02T00:00+01:00") == 23 * 3600

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"times": (20, 10)}, r"must lie behind .* got \(20.0, 10.0\); the data reach from 1 to 30; move the cuts"),
            ({"times": (10, 10)}, "must lie behind"),
            ({"times": (0, 10)}, "nothing lies before 0.0, so there is nothing to train on"),
            ({"times": (10, 31)}, "no user has an item between 31.0 and inf and another before"),
            ({"times": (13, 14)}, "no user has an item between 13.0 and 14.0 and another before"),
            ({"times": (10,)}, "split_times must be two moments, for validation and test, got 1"),
            ({"times": ("10", "nan")}, "split_times must be a number or a date such as 2001-12-31, got 'nan'"),
            ({"times": ("10", "31.12.2001")}, "split_times must be a number or a date .*, got '31.12.2001'"),
            ({"quantiles": (0, 0.5)}, "split_quantiles must ascend between 0 and 1, got 0 and 0.5"),
            ({"quantiles": (0.5, 1.0)}, "split_quantiles must ascend"),
        ],
    )
    def test_refuses(self, options, message):
        with pytest.raises(ValueError, match=message):
            global_time(build(USERS), **options)

    def test_one_moment_cannot_be_split(self):
        with pytest.raises(ValueError, match="must lie behind the one for validation"):
            global_time(build({"a": [(5, 1), (5, 2)], "b": [(5, 1)]}))

    def test_needs_times(self):
        with pytest.raises(ValueError, match="global-time needs the time of every interaction"):
            global_time(Interactions.from_sequences([[1, 2, 3]]))

    def test_everything_behind_it_works_with_fewer_users(self):
        split = global_time(build(USERS), times=(10, 20))
        assert pack(split.train, max_length=4, batch_size=2).num_tokens == 2
        unseen = NegativeSampler.from_interactions(split.train)
        assert unseen.offsets.tolist() == [0, 2, 3, 4, 6]
        import flax.nnx as nnx

        model = SASRec(6, max_length=4, embedding_dim=4, num_blocks=1, num_heads=1, rngs=nnx.Rngs(0))
        for history, targets in [(split.validation_history, split.validation), (split.test_history, split.test)]:
            ranks = FullRanking.prepare(history, targets, model=SASRec, config=make_config(max_length=4)).ranks(
                model, {}
            )
            assert ranks.shape == targets.shape


class TestMakeSplit:
    def test_names(self):
        data = build({"a": [(1, 1), (2, 2), (3, 3)]})
        assert make_split(data).protocol == leave_one_out(data).protocol == "leave-one-out"
        assert make_split(data, "global-time", quantiles=(0.4, 0.7)).test.tolist() == [3]
        assert make_split(data, "global-time", times=("2", "3")).validation.tolist() == [2]
        with pytest.raises(ValueError, match="split must be one of leave-one-out, global-time, got 'random'"):
            make_split(data, "random")

    def test_leave_one_out_keeps_ids_and_times(self):
        split = leave_one_out(build({"x": [(1, 4), (2, 5), (7, 6), (7, 1)], "y": [(3, 1), (4, 2), (5, 3)]}))
        assert as_dict(split.test_history, split.test) == {"x": ([4, 5, 6], 1), "y": ([1, 2], 3)}
        assert split.train.times.tolist() == [1, 2, 3]
        assert split.train.item_ids.tolist() == list(range(7))


def test_the_printed_protocol_is_the_one_used(tmp_path, capsys):
    path = tmp_path / "data.csv"
    rows = [(u, (3 * u + i) % 20, 10 * i + u % 7) for u in range(20) for i in range(8)]
    path.write_text("user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    small = ["--epochs", "1", "--batch-size", "8", "--embedding-dim", "8", "--max-length", "6", "--num-blocks", "1"]
    out = tmp_path / "out"
    arguments = ["--data", str(path), "--optimizer", "adamw", "--split", "global-time", "--output-dir", str(out)]
    assert main(["train", *arguments, "--split-quantiles", "0.6", "0.8", *small]) == 0
    printed = capsys.readouterr().out
    times = sorted(t for _, _, t in rows)
    assert (
        f"(global-time split at {times[96]} and {times[128]}, each user's first item behind the cut, full ranking"
        in printed
    )
    assert "leave-one-out" not in printed
    assert json.loads((out / "result.json").read_text())["protocol"] in printed
