"""The cosine between a matrix and its smoothed self, against dense algebra and the bounds of Theorem 1.

The roughness is tested with the product that it is made of, in ``test_propagate.py``.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental import sparse

import sevo_optax
from sevo_optax import alignment, graph, smooth, smoothness
from tests.sevo_optax import reference

NODES, DIM = 20, 4
FORMS = [
    {},
    {"beta": 0.0},
    {"beta": 0.5, "num_layers": 1},
    {"beta": 0.999, "num_layers": 6},
    {"beta": 0.9, "num_layers": 0},
    {"beta": 0.3, "num_layers": 2, "method": "iterative"},
    {"beta": 0.95, "num_layers": 3, "method": "iterative"},
    {"beta": 0.9, "method": "exact"},
]


@pytest.fixture
def weights():
    return reference.random_weights(np.random.default_rng(0), NODES)


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(size=(NODES, DIM))


def cosine(x, y):
    return np.sum(x * y) / (np.linalg.norm(x) * np.linalg.norm(y))


def dense(x, weights, beta=0.99, num_layers=3, method="neumann"):
    """The definition: smooth by matrix powers, then an inner product and two norms."""
    return cosine(reference.smooth(x, reference.normalize(weights), beta, num_layers, method), x)


# ---- the number ----


@pytest.mark.parametrize("options", FORMS)
def test_matches_dense_algebra(x64, x, weights, options):
    np.testing.assert_allclose(alignment(x, weights, **options), dense(x, weights, **options), rtol=1e-10)


@pytest.mark.parametrize("options", FORMS)
def test_is_the_cosine_of_what_smooth_returns_rescaled_or_not(x64, x, weights, options):
    for rescale in (True, False):
        smoothed = smooth(x, weights, rescale=rescale, **options)
        np.testing.assert_allclose(alignment(x, weights, **options), cosine(x, smoothed), rtol=1e-12)


@pytest.mark.parametrize("options", FORMS)
def test_normalised_adjacency_is_taken_as_it_is(x64, x, weights, options):
    actual = alignment(x, reference.normalize(weights), normalize=False, **options)
    np.testing.assert_allclose(actual, dense(x, weights, **options), rtol=1e-10)


def test_accepts_every_matrix_type(x64, x, weights):
    for adjacency in (
        jnp.asarray(weights),
        scipy.sparse.csr_array(weights),
        sparse.BCOO.fromdense(weights),
        sparse.BCOO.fromdense(weights, nse=weights.size),  # padded
    ):
        np.testing.assert_allclose(alignment(x, adjacency), dense(x, weights), rtol=1e-10)


def test_a_vector_is_one_column(x64, x, weights):
    np.testing.assert_allclose(alignment(x[:, 0], weights), dense(x[:, :1], weights), rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_is_computed_in_float32_at_least(x, weights, dtype):
    x = jnp.asarray(x, dtype)
    actual = alignment(x, weights)
    assert actual.dtype == jnp.float32
    assert actual.shape == ()
    # Rounding the smoothed matrix to half precision would show in the third digit.
    np.testing.assert_allclose(actual, dense(np.asarray(x, np.float64), weights), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_size_does_not_matter_however_small_or_large(x, weights, scale):
    """Squares of these would leave float32."""
    x = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(alignment(scale * x, weights), alignment(x, weights), rtol=1e-5)


def test_nothing_to_compare_gives_zero(weights):
    assert alignment(jnp.zeros((NODES, DIM)), weights) == 0
    assert alignment(jnp.zeros((NODES, 0)), weights) == 0
    # One layer of the iterative form at one half sends opposite neighbours to zero.
    pair = graph.from_edges([0], [1], num_nodes=2)
    assert alignment(jnp.array([1.0, -1.0]), pair, beta=0.5, num_layers=1, method="iterative") == 0


def test_a_nan_is_not_hidden(x, weights):
    x[3] = np.nan
    assert np.isnan(alignment(x, weights))


# ---- Theorem 1 ----

PAIRS = [(i, j) for i in range(7) for j in range(i, 7)]


@st.composite
def graphs(draw):
    """Symmetric weights over seven orders of magnitude: self-loops and isolated nodes included."""
    weights = np.zeros((7, 7))
    for i, j in draw(st.lists(st.sampled_from(PAIRS), unique=True)):
        weights[i, j] = weights[j, i] = 10.0 ** draw(st.integers(-3, 3)) * draw(st.integers(1, 9))
    return weights


matrices = (
    st.lists(st.integers(-100, 100), min_size=14, max_size=14)
    .filter(any)
    .map(lambda values: np.array(values, float).reshape(7, 2))
)


@partial(jax.jit, static_argnames="method")
def _run(x, adjacency, beta, num_layers, method):
    return alignment(x, adjacency, beta=beta, num_layers=num_layers, method=method)


def run(x, weights, beta, num_layers, method="neumann"):
    """One program for all graphs, strengths and depths."""
    return float(_run(x, sparse.BCOO.fromdense(weights, nse=49), beta, num_layers, method))


@pytest.mark.usefixtures("x64")
@settings(max_examples=150)
@given(graphs(), matrices, st.floats(0, 1, exclude_max=True), st.integers(0, 8))
def test_neumann_form_is_positive_for_every_beta(weights, x, beta, num_layers):
    actual = run(x, weights, beta, num_layers)
    assert actual > 0
    assert actual <= 1 + 1e-12
    # The eigenvalues lie between (1 - beta) / (1 + beta) and 1, up to a common factor: Kantorovich's inequality.
    assert actual >= np.sqrt((1 - beta) * (1 + beta)) * (1 - 1e-9)
    if beta < 0.9999:  # closer to 1, the reference loses digits in 1 - beta
        np.testing.assert_allclose(actual, dense(x, weights, beta, num_layers), rtol=1e-9)


@pytest.mark.usefixtures("x64")
@settings(max_examples=40)
@given(graphs(), matrices, st.floats(0, 0.999))
def test_exact_form_is_positive_for_every_beta(weights, x, beta):
    assert run(x, weights, beta, 3, "exact") >= np.sqrt(1 - beta**2) * (1 - 1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
def test_the_bound_is_attained(x64, beta):
    """On one edge: the smooth and the rough direction, mixed in the worst proportion."""
    pair = np.array([[0.0, 1.0], [1.0, 0.0]])
    low, high = (1 - beta) / (1 + beta), 1.0
    # Coefficients along the eigenvectors that minimise the cosine.
    x = np.sqrt(low) * np.array([1.0, 1.0]) + np.sqrt(high) * np.array([1.0, -1.0])
    for options in ({"num_layers": 3}, {"method": "exact"}):
        np.testing.assert_allclose(alignment(x, pair, beta=beta, **options), np.sqrt(1 - beta**2), rtol=1e-9)


@pytest.mark.usefixtures("x64")
@settings(max_examples=100)
@given(graphs(), matrices, st.floats(0, 0.4999), st.integers(0, 8))
def test_iterative_form_is_positive_below_one_half(weights, x, beta, num_layers):
    assert run(x, weights, beta, num_layers, "iterative") > 0


@pytest.mark.usefixtures("x64")
@settings(max_examples=50)
@given(st.floats(0.5, 1, exclude_min=True, exclude_max=True))
@example(0.5001)
@example(0.99)
def test_iterative_form_turns_around_above_one_half(beta):
    """Opposite neighbours and one layer: the smoothed matrix is (1 - 2 beta) times the matrix itself."""
    weights, x = np.zeros((7, 7)), np.zeros((7, 2))
    weights[0, 1] = weights[1, 0] = 1
    x[0], x[1] = 1, -1
    np.testing.assert_allclose(run(x, weights, beta, 1, "iterative"), -1, rtol=1e-9)
    assert run(x, weights, beta, 1) > 0


# ---- programs ----


def test_traces_once_and_matches_the_eager_value(x, weights):
    x = jnp.asarray(x, jnp.float32)
    adjacency = sparse.BCOO.fromdense(weights)
    for jitted in (jax.jit(alignment), jax.jit(lambda x, a, **options: alignment(x, weights, **options))):
        for beta, num_layers in ((0.5, 2), (0.9, 4)):
            actual = jitted(x, adjacency, beta=beta, num_layers=num_layers)
            np.testing.assert_allclose(actual, alignment(x, weights, beta=beta, num_layers=num_layers), rtol=1e-5)
        assert jitted._cache_size() == 1


def test_vmap_is_a_loop(x64, weights):
    tables = np.random.default_rng(2).normal(size=(5, NODES, DIM))
    actual = jax.vmap(lambda table: alignment(table, weights, beta=0.9))(tables)
    np.testing.assert_allclose(actual, [dense(table, weights, 0.9) for table in tables], rtol=1e-10)


@pytest.mark.parametrize("method", ["neumann", "iterative", "exact"])
def test_derivatives_match_finite_differences(x64, x, weights, method):
    def function(x, beta):
        return alignment(x, weights, beta=beta, num_layers=3, method=method)

    by_x, by_beta = jax.grad(function, argnums=(0, 1))(jnp.asarray(x), 0.9)
    step = 1e-4
    along = np.random.default_rng(3).normal(size=x.shape)
    expected = (function(x + step * along, 0.9) - function(x - step * along, 0.9)) / (2 * step)
    np.testing.assert_allclose(np.sum(by_x * along), expected, rtol=1e-5, atol=1e-9)
    expected = (function(x, 0.9 + step) - function(x, 0.9 - step)) / (2 * step)
    np.testing.assert_allclose(by_beta, expected, rtol=1e-5)


def test_derivative_at_zero_is_zero_and_not_nan(weights):
    gradient = jax.grad(lambda x: alignment(x, weights))(jnp.zeros((NODES, DIM)))
    np.testing.assert_array_equal(gradient, 0)


# ---- what is refused ----


@pytest.mark.parametrize("function", [alignment, smoothness])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.ones((NODES, DIM), int)}, TypeError, "x must be a real floating-point array, got int"),
        ({"x": np.ones((NODES, DIM, 2))}, ValueError, r"x must have shape .* got \(20, 4, 2\)"),
        ({"x": np.ones((3, DIM))}, ValueError, "x has 3 rows, but adjacency has 20 nodes"),
        ({"adjacency": np.ones((NODES, 3))}, ValueError, r"adjacency has shape \(20, 3\); wanted"),
        ({"adjacency": -np.ones((NODES, NODES))}, ValueError, r"adjacency\[0, 0\] = -1; weights must be"),
        ({"adjacency": np.triu(np.ones((NODES, NODES)))}, ValueError, "adjacency is not symmetric"),
        ({"adjacency": "ring"}, TypeError, "adjacency is a str; wanted a BCOO"),
    ],
)
def test_refuses_what_does_not_fit(x, weights, function, change, error, message):
    with pytest.raises(error, match=message):
        function(**{"x": x, "adjacency": weights, **change})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": 1.0}, ValueError, r"beta must lie in \[0, 1\), got 1.0"),
        ({"beta": -0.1}, ValueError, r"beta must lie in \[0, 1\), got -0.1"),
        ({"beta": "high"}, TypeError, r"beta must be a number in \[0, 1\) or a schedule, got 'high'"),
        ({"beta": lambda count: 0.9}, TypeError, "beta must be a number here; schedules belong to sevo"),
        ({"num_layers": -1}, ValueError, "num_layers must be at least 0, got -1"),
        ({"num_layers": 1.5}, TypeError, "num_layers must be an integer, got 1.5"),
        ({"method": "magic"}, ValueError, "method must be one of neumann, iterative, exact, got 'magic'"),
    ],
)
def test_refuses_a_form_that_is_none(x, weights, options, error, message):
    with pytest.raises(error, match=message):
        alignment(x, weights, **options)


def test_signature_and_home():
    assert sevo_optax.alignment is alignment
    parameters = inspect.signature(alignment).parameters
    assert list(parameters) == ["x", "adjacency", "beta", "num_layers", "method", "normalize"]
    defaults = {name: parameter.default for name, parameter in inspect.signature(smooth).parameters.items()}
    assert all(parameter.default == defaults[name] for name, parameter in parameters.items())
