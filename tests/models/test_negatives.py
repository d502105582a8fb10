import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from models.data import Interactions, UnseenItems
from models.data.negatives import Proposal, _alias_table

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


def test_counts_are_those_of_the_interactions():
    data = Interactions.from_sequences([[3, 1, 3], [3], [2, 1]], num_items=5)
    proposal = UnseenItems.from_interactions(data, negative_power=2.0).proposal
    np.testing.assert_allclose(
        np.exp(proposal.log_probability(jnp.arange(6))), np.array([0, 4, 1, 9, 0, 0]) / 14, rtol=1e-6
    )
    assert UnseenItems.from_interactions(data).proposal.log_probabilities is None


def test_compiled_and_for_several_seeds():
    data = Interactions.from_sequences([[3, 1, 3], [3], [2, 1]], num_items=5)
    unseen = UnseenItems.from_interactions(data, negative_power=0.5)
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(lambda key, unseen: unseen.proposal.sample(key, (9,)), in_axes=(0, None)))(keys, unseen)
    for key, draws in zip(keys, together, strict=True):
        np.testing.assert_array_equal(draws, unseen.proposal.sample(key, (9,)))


def test_who_knows_everything_is_named_as_in_the_data():
    data = Interactions.from_sequences([[1], [1, 2, 3]], user_ids=["ann", "bob"])
    with pytest.raises(ValueError, match="user bob has interacted with all 3 items"):
        UnseenItems.from_interactions(data)
