import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from models.data import Interactions
from models.feeds import NegativeSampler
from models.feeds.negatives import Proposal, _alias_table, _as_words, _multiply, _random_below

COUNTS = np.array([99, 8, 0, 1, 27, 64, 0, 2])


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40).filter(lambda weights: sum(weights) > 0))
def test_the_alias_table_has_the_probabilities(weights):
    probabilities = np.array(weights) / np.sum(weights)
    threshold, alias = _alias_table(probabilities)
    assert ((threshold >= 0) & (threshold <= 1)).all()
    shares = threshold + np.bincount(alias, 1 - threshold, minlength=len(weights))
    np.testing.assert_allclose(shares / len(weights), probabilities, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_draws_follow_the_counts(power):
    proposal = Proposal.from_counts(COUNTS, power)
    draws = np.asarray(proposal.sample(jax.random.key(0), (200, 500)))
    assert draws.shape == (200, 500)
    weights = np.ones(7) if power == 0 else np.where(COUNTS[1:] > 0, COUNTS[1:] ** power, 0)
    found = np.bincount(draws.ravel(), minlength=8)
    assert found[0] == 0
    possible = weights > 0
    assert found[1:][~possible].sum() == 0
    expected = draws.size * (weights / weights.sum())[possible]
    assert scipy.stats.chisquare(found[1:][possible], expected).pvalue > 1e-3
    got = np.asarray(proposal.log_probability(jnp.arange(1, 8)))
    assert got.dtype == np.float32
    np.testing.assert_allclose(np.exp(got), weights / weights.sum(), rtol=1e-6)


def test_a_large_catalogue():
    """Rare items of a catalogue too large for a float32 of cumulated probabilities."""
    counts = np.full(2**21 + 1, 1)
    counts[1] = 2**21
    proposal = Proposal.from_counts(counts, 1.0)
    draws = np.asarray(proposal.sample(jax.random.key(1), (100_000,)))
    assert np.mean(draws == 1) == pytest.approx(0.5, abs=0.01)
    others = draws[draws != 1]
    assert scipy.stats.kstest(others / 2**21, "uniform").pvalue > 1e-3
    assert np.mean(others % 2) == pytest.approx(0.5, abs=0.01)


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**31 - 1))
def test_products_of_96_bits(number, count):
    halves = np.array([number >> 32, number % 2**32], np.uint32)
    words = jax.jit(_multiply)(halves[0], halves[1], np.uint32(count))
    highest, middle, lowest = map(int, words)
    assert (highest << 64) + (middle << 32) + lowest == number * count


@given(st.floats(0, 1 - 2**-53))
def test_shares_as_words(share):
    upper, lower = _as_words(np.array([share]))[:, 0].tolist()
    assert (upper << 32) + lower == int(share * 2**64)


def test_draws_below_a_count_begin_as_a_uniform_draw():
    """What was trained with float32 draws goes on: small catalogues get the same negatives."""
    key, counts = jax.random.key(5), jnp.array([[7], [1], [12_101]])
    draws, *rest = _random_below(key, (3, 500), counts)
    np.testing.assert_array_equal(draws, jnp.floor(jax.random.uniform(key, (3, 500)) * counts))
    for part in rest:
        assert part.dtype == jnp.uint32
    # What is left is uniform where the count is not so large that only the last bits are.
    assert scipy.stats.kstest(np.asarray(rest[0], np.float64).ravel() / 2**32, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("num_items", [20_000_000, 3 * 2**23])
def test_no_item_of_a_huge_catalogue_is_left_out(num_items):
    """A float32 has 2**23 uniform values: drawn with one, most of these items would never come."""
    seen = jnp.array([3, 2**23, num_items - 4], jnp.int32)
    sampler = NegativeSampler(
        unseen_before=seen - 1 - jnp.arange(3),
        offsets=jnp.array([0, 3], jnp.int32),
        proposal=Proposal(None, None, None, num_items),
        num_items=num_items,
        longest=3,
    )
    key, users = jax.random.key(0), jnp.zeros(300_000, jnp.int32)
    for draws in (sampler.sample(key, users), sampler.proposal.sample(key, users.shape)):
        draws = np.asarray(draws)
        assert 1 <= draws.min() < draws.max() <= num_items
        assert scipy.stats.kstest(draws / num_items, "uniform").pvalue > 1e-3
        for modulus in (3, 5, 16):
            counts = np.bincount(draws % modulus, minlength=modulus)
            assert scipy.stats.chisquare(counts).pvalue > 1e-3
    assert not np.isin(np.asarray(sampler.sample(key, users)), seen).any()


def test_a_large_power_draws_the_most_frequent():
    probabilities = np.exp(np.asarray(Proposal.from_counts(np.array([0, 300, 2, 1]), 200.0).log_probabilities))
    np.testing.assert_array_equal(probabilities, [0, 1, 0, 0])


def test_small_shares_of_a_cell_are_met():
    """Items so rare that a float32 could not tell their share of a cell from none, or would draw them too often."""
    proposal = Proposal.from_counts(np.array([0, 10**12, 1, 3]), 1.0)
    share = (proposal.threshold[0].astype(float) * 2.0**32 + proposal.threshold[1]) / 2.0**64
    np.testing.assert_allclose(share[1:], np.array([1, 3]) * 3 / (10**12 + 4), rtol=1e-6)
    fraction = Proposal(
        threshold=jnp.array([[0, 2**20, 0], [5, 0, 0]], jnp.uint32),
        alias=jnp.array([3, 3, 3], jnp.int32),
        log_probabilities=jnp.zeros(4),
        num_items=3,
    )
    draws = np.asarray(fraction.sample(jax.random.key(0), (600_000,)))
    assert not (draws == 1).any()
    assert 20 < np.sum(draws == 2) < 90  # 2**-12 of the second cell, which is drawn 200,000 times: 49, give or take 7


def test_counts_are_those_of_the_interactions():
    data = Interactions.from_sequences([[3, 1, 3], [3], [2, 1]], num_items=5)
    proposal = NegativeSampler.from_interactions(data, negative_power=2.0).proposal
    np.testing.assert_allclose(
        np.exp(proposal.log_probability(jnp.arange(6))), np.array([0, 4, 1, 9, 0, 0]) / 14, rtol=1e-6
    )
    assert NegativeSampler.from_interactions(data).proposal.log_probabilities is None


def test_compiled_and_for_several_seeds():
    data = Interactions.from_sequences([[3, 1, 3], [3], [2, 1]], num_items=5)
    unseen = NegativeSampler.from_interactions(data, negative_power=0.5)
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(lambda key, unseen: unseen.proposal.sample(key, (9,)), in_axes=(0, None)))(keys, unseen)
    for key, draws in zip(keys, together, strict=True):
        np.testing.assert_array_equal(draws, unseen.proposal.sample(key, (9,)))


def test_who_knows_everything_is_named_as_in_the_data():
    data = Interactions.from_sequences([[1], [1, 2, 3]], user_ids=["ann", "bob"])
    with pytest.raises(ValueError, match="user bob has interacted with all 3 items"):
        NegativeSampler.from_interactions(data)
