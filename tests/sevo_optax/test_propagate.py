"""The smoothing as a plain function: every form against dense algebra, and every transformation of JAX on it."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental import sparse
from jax.test_util import check_grads

from sevo_optax import _propagate, alignment, graph, propagate, residual, smooth, smoothness
from tests.sevo_optax import reference

FORMS = [
    ("neumann", True),
    ("neumann", False),
    ("iterative", True),
    ("exact", True),
]
forms = pytest.mark.parametrize(("method", "rescale"), FORMS)


@pytest.fixture
def weights(rng):
    return reference.random_weights(rng, 30)


@pytest.fixture
def x(rng):
    return rng.normal(size=(30, 5))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


@forms
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("num_layers", [0, 1, 4])
def test_forms_match_dense_algebra_in_float64(x64, x, weights, method, rescale, beta, num_layers):
    expected = reference.smooth(x, reference.normalize(weights), beta, num_layers, method, rescale)
    actual = smooth(x, weights, beta=beta, num_layers=num_layers, method=method, rescale=rescale)
    assert actual.dtype == np.float64
    assert relative_error(actual, expected) < 1e-10


@forms
def test_forms_match_dense_algebra_in_float32(x, weights, method, rescale):
    expected = reference.smooth(x, reference.normalize(weights), 0.99, 3, method, rescale)
    actual = smooth(x.astype(np.float32), weights, beta=0.99, num_layers=3, method=method, rescale=rescale)
    assert actual.dtype == np.float32
    # The conjugate gradients stop at a residual of 1e-6, which the condition number, up to 200 here, multiplies.
    assert relative_error(actual, expected) < (2e-4 if method == "exact" else 1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_rounds_only_the_result(x, weights, dtype):
    x = jnp.asarray(x, dtype)
    actual = smooth(x, weights)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, smooth(x.astype(jnp.float32), weights).astype(dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_exact_form_solves_to_its_stated_tolerance(x64, x, weights, dtype, tolerance):
    x = x.astype(dtype)
    solution = np.asarray(smooth(x, weights, beta=0.99, method="exact"), np.float64)
    assert _propagate.EXACT_TOLERANCE[np.dtype(dtype).name] == tolerance
    target = 0.01 * x.astype(np.float64)
    residual = solution - 0.99 * reference.normalize(weights) @ solution - target
    rounding = 4 * np.finfo(dtype).eps * np.linalg.norm(x)
    assert np.linalg.norm(residual) < tolerance * np.linalg.norm(target) + rounding


def test_neumann_converges_to_the_exact_solution(x64, x, weights):
    beta = 0.8
    exact = reference.smooth(x, reference.normalize(weights), beta, method="exact")
    for rescale in (True, False):
        errors = [
            relative_error(smooth(x, weights, beta=beta, num_layers=n, rescale=rescale), exact)
            for n in (0, 5, 10, 20, 40, 120)
        ]
        assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors))
        # The rest of the series after L terms is at most βᴸ⁺¹ of the whole.
        assert errors[-1] < 1e-10
    iterated = relative_error(smooth(x, weights, beta=beta, num_layers=120, method="iterative"), exact)
    assert iterated < 1e-10


def test_beta_and_layers_may_be_traced(x64, x, weights):
    adjacency = reference.normalize(weights)

    @jax.jit
    def run(beta, num_layers):
        return smooth(x, scipy.sparse.csr_array(weights), beta=beta, num_layers=num_layers)

    for beta, num_layers in [(0.0, 2), (0.9, 0), (0.9, 5)]:
        expected = reference.smooth(x, adjacency, beta, num_layers)
        assert relative_error(run(beta, num_layers), expected) < 1e-10
    assert run._cache_size() == 1


def test_rescaling_is_accurate_near_one(x64, x, weights):
    adjacency = reference.normalize(weights)
    plain_mean = sum(np.linalg.matrix_power(adjacency, n) for n in range(4)) @ x / 4
    # 1 - βᴸ⁺¹ by subtraction would lose six digits here.
    actual = smooth(x, weights, beta=1 - 1e-10)
    assert relative_error(actual, plain_mean) < 1e-9


@pytest.mark.parametrize("normalize", [True, False])
def test_accepts_every_matrix_type(x64, x, weights, normalize):
    matrix = weights if normalize else reference.normalize(weights)
    expected = reference.smooth(x, reference.normalize(weights), 0.9)
    kinds = [
        matrix,
        jnp.asarray(matrix),
        scipy.sparse.csr_array(matrix),
        scipy.sparse.coo_matrix(matrix),
        sparse.BCOO.fromdense(matrix),
        sparse.BCOO.fromdense(matrix, nse=matrix.size),  # padded
    ]
    for adjacency in kinds:
        assert relative_error(smooth(x, adjacency, beta=0.9, normalize=normalize), expected) < 1e-10


def test_vectors_are_smoothed_as_one_column(x64, x, weights):
    np.testing.assert_allclose(smooth(x[:, 0], weights), smooth(x[:, :1], weights)[:, 0], rtol=1e-14)
    np.testing.assert_allclose(smoothness(x[:, 0], weights), smoothness(x[:, :1], weights), rtol=1e-14)


def test_smoothness_matches_dense_algebra_and_the_sum_over_pairs(x64, x, weights):
    adjacency = reference.normalize(weights)
    np.testing.assert_allclose(smoothness(x, weights), reference.smoothness(x, adjacency), rtol=1e-12)
    np.testing.assert_allclose(
        smoothness(x, adjacency, normalize=False), reference.smoothness(x, adjacency), rtol=1e-12
    )
    degree = weights.sum(axis=1)
    connected = degree > 0
    scaled = x[connected] / np.sqrt(degree[connected])[:, None]
    pairs = weights[np.ix_(connected, connected)] * ((scaled[:, None] - scaled) ** 2).sum(axis=2)
    expected = pairs.sum() / 2 + (x[~connected] ** 2).sum()
    np.testing.assert_allclose(smoothness(x, weights), expected, rtol=1e-12)


def test_smoothness_of_half_precision_is_computed_in_float32(x, weights):
    x = jnp.asarray(x, jnp.bfloat16)
    assert smoothness(x, weights).dtype == jnp.float32
    np.testing.assert_allclose(
        smoothness(x, weights),
        reference.smoothness(np.asarray(x, np.float64), reference.normalize(weights)),
        rtol=1e-5,
    )


def test_isolated_node_is_scaled_by_the_factor_in_front_of_the_sum(x64, x, weights):
    (alone,) = np.flatnonzero(weights.sum(axis=1) == 0)
    factor = 0.01 / (1 - 0.99**4)
    np.testing.assert_allclose(factor, 0.254, atol=5e-4)
    np.testing.assert_allclose(smooth(x, weights)[alone], factor * x[alone], rtol=1e-12)
    np.testing.assert_allclose(smooth(x, weights, rescale=False)[alone], 0.01 * x[alone], rtol=1e-12)
    np.testing.assert_allclose(smooth(x, weights, method="exact")[alone], 0.01 * x[alone], rtol=1e-10)


# ---- adjacency as an argument of a jitted function ----


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["sorted", "shuffled", "padded"])
def test_traced_bcoo_matches_dense_algebra(x64, x, weights, rng, normalize, kind):
    matrix = weights if normalize else reference.normalize(weights)
    adjacency = sparse.BCOO.fromdense(matrix, nse=matrix.size if kind == "padded" else None)
    if kind == "shuffled":
        order = rng.permutation(adjacency.nse)
        adjacency = sparse.BCOO((adjacency.data[order], adjacency.indices[order]), shape=adjacency.shape)
    run = jax.jit(lambda x, a: (smooth(x, a, beta=0.9, normalize=normalize), smoothness(x, a, normalize=normalize)))
    smoothed, roughness = run(x, adjacency)
    expected = reference.normalize(weights)
    assert relative_error(smoothed, reference.smooth(x, expected, 0.9)) < 1e-10
    np.testing.assert_allclose(roughness, reference.smoothness(x, expected), rtol=1e-10)


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (sparse.BCOO.fromdense(np.ones((3, 5))), ValueError, r"adjacency has shape \(3, 5\); wanted"),
        (sparse.BCOO((np.ones(1, bool), np.zeros((1, 2), int)), shape=(3, 3)), TypeError, "adjacency has dtype bool"),
        (sparse.BCOO.fromdense(np.ones((3, 3)), n_dense=1), ValueError, "adjacency has n_batch=0 and n_dense=1"),
        (sparse.BCOO.fromdense(np.ones((3, 3)), n_batch=1), ValueError, "adjacency has n_batch=1 and n_dense=0"),
    ],
)
def test_a_traced_bcoo_is_refused_as_a_concrete_one_is(matrix, error, message):
    x = np.ones((3, 2), np.float32)
    for function in (smooth, propagate, smoothness):
        for call in (jax.jit(function), function):
            with pytest.raises(error, match=message):
                call(*((matrix, x) if function is propagate else (x, matrix)))


def test_padding_keeps_a_nan_where_it_is(x64, weights, x):
    x[-1] = np.nan
    weights[-1] = weights[:, -1] = 0
    padded = sparse.BCOO.fromdense(weights, nse=weights.size)
    out = np.asarray(jax.jit(smooth)(x, padded))
    assert np.isnan(out[-1]).all()
    assert np.isfinite(out[:-1]).all()


# ---- derivatives ----


@forms
def test_gradients_with_respect_to_x_and_beta(x64, x, weights, method, rescale):
    @jax.jit
    def run(x, beta):
        return smooth(x, weights, beta=beta, method=method, rescale=rescale)

    check_grads(run, (x, 0.7), order=1, modes=["fwd", "rev"], rtol=1e-5, atol=1e-5)


def test_second_derivatives(x64, x, weights):
    run = jax.jit(lambda x, beta: jnp.tanh(smooth(x, weights, beta=beta, num_layers=2)))
    check_grads(run, (x, 0.7), order=2, modes=["rev"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", ["neumann", "iterative"])
def test_gradients_with_respect_to_the_weights(x64, rng, normalize, method):
    weights = reference.random_weights(rng, 8, 0.5)
    x = rng.normal(size=(8, 3))
    adjacency = sparse.BCOO.fromdense(weights if normalize else reference.normalize(weights))
    rows, columns = np.asarray(adjacency.indices).T
    # Both copies of an edge carry one weight, so that the perturbed matrix stays symmetric.
    pairs = {pair: k for k, pair in enumerate(sorted({(min(p), max(p)) for p in zip(rows, columns, strict=True)}))}
    shared = np.array([pairs[min(p), max(p)] for p in zip(rows, columns, strict=True)])
    edges = np.zeros(len(pairs))
    edges[shared] = adjacency.data

    @jax.jit
    def run(edges, x):
        matrix = sparse.BCOO((edges[shared], adjacency.indices), shape=adjacency.shape, indices_sorted=True)
        return smooth(x, matrix, beta=0.7, method=method, normalize=normalize)

    check_grads(run, (edges, x), order=1, modes=["fwd", "rev"], rtol=1e-5, atol=1e-5)

    def dense(edges):
        matrix = jnp.zeros((8, 8)).at[rows, columns].set(edges[shared])
        if normalize:
            degree = matrix.sum(axis=1)
            scale = jnp.where(degree > 0, jnp.where(degree > 0, degree, 1) ** -0.5, 0)
            matrix = scale[:, None] * matrix * scale[None]
        powers = [jnp.linalg.matrix_power(matrix, n) for n in range(4)]
        if method == "neumann":
            return sum(0.7**n * p for n, p in enumerate(powers)) @ x * 0.3 / (1 - 0.7**4)
        return (0.7**3 * powers[3] + 0.3 * sum(0.7**n * powers[n] for n in range(3))) @ x

    ours = jax.grad(lambda e: jnp.sum(jnp.sin(run(e, x))))(edges)
    theirs = jax.jit(jax.grad(lambda e: jnp.sum(jnp.sin(dense(e)))))(edges)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_product_with_a_tangent_that_is_not_symmetric_transposes(x64, rng):
    weights = reference.random_weights(rng, 6, 0.6)
    csr = _propagate.prepare(weights, np.float64, normalize=True)
    x = rng.normal(size=(6, 2))
    # Every stored entry moves by itself: the linear map x -> dA·x is then not its own transpose.
    data = np.asarray(csr.data)

    def run(data, x):
        return _propagate.propagate(csr._replace(data=data), x)

    def tangent(x):
        return jax.jvp(lambda d: run(d, x), (data,), (np.arange(data.size, dtype=float),))[1]

    dense = np.zeros((6, 6))
    rows = np.repeat(np.arange(6), np.diff(csr.indptr))
    dense[rows, np.asarray(csr.indices)] = np.arange(data.size)
    np.testing.assert_allclose(tangent(x), dense @ x, rtol=1e-12)
    np.testing.assert_allclose(jax.vjp(tangent, x)[1](x)[0], dense.T @ x, rtol=1e-12)
    # Derivatives that are zero by structure.
    zero = jax.grad(lambda d, x: jnp.sum(jax.lax.stop_gradient(run(d, x))), argnums=(0, 1))(data, x)
    assert not any(np.any(z) for z in zero)


# ---- batching ----


@forms
def test_vmap_equals_a_loop(x64, rng, weights, method, rescale):
    x = rng.normal(size=(4, 30, 3))

    def run(x):
        return smooth(x, weights, beta=0.9, method=method, rescale=rescale)

    expected = np.stack([run(row) for row in x])
    assert relative_error(jax.vmap(run)(x), expected) < 1e-10
    assert (
        relative_error(jax.vmap(run, in_axes=2, out_axes=1)(np.moveaxis(x, 0, 2)), np.moveaxis(expected, 0, 1)) < 1e-10
    )
    nested = jax.vmap(jax.vmap(run))(x.reshape(2, 2, 30, 3))
    assert relative_error(nested.reshape(expected.shape), expected) < 1e-10


def test_vmap_over_beta_and_over_graphs(x64, rng, x):
    many = np.stack([reference.random_weights(rng, 30) for _ in range(3)])
    betas = np.array([0.1, 0.5, 0.9])
    run = jax.vmap(lambda beta: smooth(x, many[0], beta=beta))
    expected = np.stack([reference.smooth(x, reference.normalize(many[0]), beta) for beta in betas])
    assert relative_error(run(betas), expected) < 1e-10

    graphs = sparse.BCOO.fromdense(many, n_batch=1)
    flat = jax.jit(jax.vmap(lambda data, indices: smooth(x, sparse.BCOO((data, indices), shape=(30, 30)), beta=0.5)))
    expected = np.stack([reference.smooth(x, reference.normalize(w), 0.5) for w in many])
    assert relative_error(flat(graphs.data, graphs.indices), expected) < 1e-10


def test_vmap_folds_the_batch_into_columns_of_one_product(weights):
    csr = _propagate.prepare(weights, np.float32, normalize=True)
    batched = jax.vmap(lambda x: _propagate.series(csr, x, 0.9, 3, "neumann", True))
    x = jnp.ones((4, 30, 8))
    products = re.findall(r":f32\[([\d,]+)\] = sevo_propagate", str(jax.make_jaxpr(batched)(x)))
    assert products == ["30,32"]


# ---- lowering ----


def lowered(platform, x=None, **options):
    weights = reference.random_weights(np.random.default_rng(0), 30)
    csr = _propagate.prepare(weights, np.float32, normalize=True)
    run = jax.jit(lambda csr, x: _propagate.series(csr, x, 0.9, 3, "neumann", True))
    x = jnp.ones((30, 8)) if x is None else x
    return run.trace(csr, x).lower(lowering_platforms=(platform,)).as_text()


def test_cpu_takes_the_compressed_row_kernel_and_the_others_gather_and_add():
    kernel = r"stablehlo\.custom_call @\w*csr\w*"
    assert re.search(kernel, lowered("cpu"))
    for platform in ("cuda", "tpu", "rocm"):
        text = lowered(platform)
        assert not re.search(kernel, text)
        assert "stablehlo.gather" in text
        assert "stablehlo.scatter" in text


def test_kernels_agree(x64, x, weights):
    csr = _propagate.prepare(weights, np.float64, normalize=True)
    expected = reference.normalize(weights) @ x
    for kernel in (_propagate._csr_kernel, _propagate._segment_kernel):
        assert relative_error(kernel(*csr, x), expected) < 1e-12
        assert relative_error(jax.jit(kernel)(*csr, x), expected) < 1e-12
        empty = _propagate.prepare(np.zeros((30, 30)), np.float64, normalize=True)
        np.testing.assert_array_equal(kernel(*empty, x), np.zeros_like(x))


def test_half_precision_stays_on_the_fast_kernel():
    weights = reference.random_weights(np.random.default_rng(0), 30)
    run = jax.jit(lambda x: smooth(x, weights))
    text = run.lower(jnp.ones((30, 4), jnp.bfloat16)).as_text()
    assert re.search(r"custom_call @\w*csr\w*.*tensor<30x4xf32>", text)


def test_graph_without_edges_scales_every_row(x64, x):
    np.testing.assert_allclose(smooth(x, np.zeros((30, 30)), beta=0.5, num_layers=1), x * 0.5 / 0.75, rtol=1e-12)
    assert smooth(np.ones((0,)).reshape(1, 0), np.ones((1, 1))).shape == (1, 0)
    for shape in ((3, 1, 0), (0, 1, 4)):
        assert jax.vmap(lambda x: smooth(x, np.ones((1, 1))))(np.ones(shape)).shape == shape


# ---- the product ----


def test_product_is_that_of_scipy(x64, x, weights):
    for matrix in (weights, graph.normalize(weights)):
        dense = matrix if isinstance(matrix, np.ndarray) else np.asarray(matrix.todense(), np.float64)
        expected = scipy.sparse.csr_array(dense) @ x
        assert relative_error(propagate(matrix, x), expected) < 1e-14
        assert relative_error(jax.jit(propagate)(sparse.BCOO.fromdense(dense), x), expected) < 1e-14
        assert relative_error(propagate(matrix, x[:, 0]), expected[:, 0]) < 1e-14


@pytest.mark.parametrize("traced", [False, True])
def test_derivative_of_the_product_is_the_product(x64, rng, x, weights, traced):
    cotangent = rng.normal(size=x.shape)
    adjacency = sparse.BCOO.fromdense(weights)

    def pull(adjacency, x):
        return jax.vjp(lambda x: propagate(adjacency, x), x)[1](cotangent)[0]

    actual = jax.jit(pull)(adjacency, x) if traced else pull(adjacency, x)
    assert relative_error(actual, weights @ cotangent) < 1e-14
    check_grads(lambda x: propagate(adjacency, x), (x,), order=2, modes=("fwd", "rev"))
    compiled = jax.jit(pull).lower(adjacency, x).compile().as_text()
    assert len(re.findall(r"custom_call_target=\"\w*csr\w*\"", compiled)) == 1
    assert "scatter" not in compiled


def test_product_of_a_batch_and_in_half_precision(x, weights):
    x = x.astype(np.float32)
    batch = np.stack([x, 2 * x])
    np.testing.assert_allclose(
        jax.vmap(lambda x: propagate(weights, x))(batch), np.einsum("ij,bjk->bik", weights, batch), rtol=1e-5
    )
    half = jnp.asarray(x, jnp.bfloat16)
    assert propagate(weights, half).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        propagate(weights, half), propagate(weights, half.astype(np.float32)).astype("bfloat16")
    )


@pytest.mark.parametrize(
    ("adjacency", "x", "error", "message"),
    [
        (np.triu(np.ones((3, 3))), np.ones((3, 1), np.float32), ValueError, "not symmetric"),
        (np.ones((3, 3)), np.ones((4, 1), np.float32), ValueError, "x has 4 rows, but adjacency has 3 nodes"),
        (np.ones((3, 3)), np.ones((3, 1), int), TypeError, "floating-point"),
        (np.ones((3, 1), np.float32), np.ones((3, 3), np.float32), ValueError, r"adjacency has shape \(3, 1\)"),
    ],
)
def test_product_refuses(adjacency, x, error, message):
    with pytest.raises(error, match=message):
        propagate(adjacency, x)


# ---- whether the exact form has converged ----


@pytest.mark.parametrize("method", ["exact", "neumann"])
def test_residual_is_that_of_dense_algebra_and_bounds_the_error(x64, x, weights, method):
    adjacency = reference.normalize(weights)
    smoothed = smooth(x, weights, beta=0.9, method=method)
    actual = jax.jit(lambda y, x: residual(y, x, weights, beta=0.9))(smoothed, x)
    off = 0.1 * x - (np.eye(30) - 0.9 * adjacency) @ np.asarray(smoothed)
    expected = np.linalg.norm(off) / (0.1 * np.linalg.norm(x))
    error = np.asarray(smoothed) - reference.smooth(x, adjacency, 0.9, method="exact")
    np.testing.assert_allclose(actual, expected, rtol=1e-9 if method == "neumann" else 1e-2)
    assert np.linalg.norm(error) / np.linalg.norm(x) <= actual * (1 + 1e-9)
    assert (actual < 1e-11) == (method == "exact")
    # Free of the scale, also where squares would leave the range of the dtype.
    for scale in (1e-200, 1e200):
        np.testing.assert_allclose(residual(smoothed * scale, x * scale, weights, beta=0.9), actual, rtol=1e-2)


def test_exact_form_warns_where_it_has_not_converged(x, weights):
    x = x.astype(np.float32)
    for run in (smooth, alignment):
        with pytest.warns(RuntimeWarning, match=r"has not converged: relative residual .*, wanted at most 1e-04"):
            run(x, weights, beta=1 - 1e-6, method="exact")
    # Not in the program itself, and not where it has converged.
    jax.jit(lambda x: smooth(x, weights, beta=1 - 1e-6, method="exact"))(x)
    smooth(x, weights, beta=0.99, method="exact")


def test_exact_form_is_linear_in_the_scale(x, weights):
    """Gradients may be so small that their squares are no numbers any more."""
    x = x.astype(np.float32)
    run = jax.jit(lambda x: smooth(x, weights, beta=0.99, method="exact"))
    for exponent in (-90, -60, 60, 120):
        np.testing.assert_array_equal(run(np.ldexp(x, exponent)), np.ldexp(run(x), exponent))
    assert not run(np.zeros_like(x)).any()
    both = np.stack([x, np.ldexp(x, -60)])
    np.testing.assert_allclose(jax.vmap(run)(both)[1], np.ldexp(run(x), -60), rtol=1e-5)
    slope = jax.grad(lambda x: run(x)[0].sum())(x)
    np.testing.assert_allclose(slope, jax.grad(lambda x: run(x)[0].sum())(8 * x), rtol=1e-4, atol=1e-7)


def test_exact_form_ends_where_there_is_no_solution(x):
    """Raw weights passed off as normalised ones, in bounded time: ten iterations a number would take hours."""
    raw = scipy.sparse.diags_array([1.0, 1.0], offsets=[-1, 1], shape=(20_000, 20_000)).tocsr()
    table = np.random.default_rng(0).normal(size=(20_000, 2)).astype(np.float32)
    run = jax.jit(lambda x: smooth(x, raw, beta=0.9, method="exact", normalize=False))
    assert not residual(run(table), table, raw, beta=0.9, normalize=False) < 1e-3


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": 1.0}, ValueError, r"beta must lie in \[0, 1\), got 1\.0"),
        ({"beta": -0.1}, ValueError, r"beta must lie in \[0, 1\), got -0\.1"),
        ({"beta": float("nan")}, ValueError, r"beta must lie in \[0, 1\), got nan"),
        ({"beta": np.ones(2)}, TypeError, "beta must be a number"),
        ({"beta": "0.9"}, TypeError, "beta must be a number"),
        ({"beta": True}, TypeError, "beta must be a number"),
        ({"beta": 0.5 + 0j}, TypeError, "beta must be a number"),
        ({"beta": lambda step: 0.9}, TypeError, r"schedules belong to sevo\("),
        ({"num_layers": -1}, ValueError, "num_layers must be at least 0, got -1"),
        ({"num_layers": 1.5}, TypeError, r"num_layers must be an integer, got 1\.5"),
        ({"num_layers": True}, TypeError, "num_layers must be an integer, got True"),
        ({"num_layers": 2**31}, ValueError, r"num_layers must be below 2\*\*31, got 2147483648"),
        ({"num_layers": 2**70}, ValueError, r"num_layers must be below 2\*\*31"),
        ({"x": jnp.ones((30, 2), jnp.float8_e4m3fn)}, TypeError, "x has dtype float8_e4m3fn; wanted float16, bfloat16"),
        ({"method": "nsa"}, ValueError, "method must be one of neumann, iterative, exact, got 'nsa'"),
        ({"x": np.ones((30, 2), np.int32)}, TypeError, "x must be a real floating-point array, got int32"),
        ({"x": np.ones((30, 2), np.complex64)}, TypeError, "got complex64"),
        ({"x": np.ones((30, 2, 2), np.float32)}, ValueError, r"got \(30, 2, 2\); use jax\.vmap"),
        ({"x": np.ones((29, 2), np.float32)}, ValueError, "x has 29 rows, but adjacency has 30 nodes"),
        ({"adjacency": np.triu(np.ones((30, 30)), 1)}, ValueError, "adjacency is not symmetric"),
        ({"adjacency": -np.ones((30, 30))}, ValueError, "non-negative"),
        ({"adjacency": np.full((30, 30), np.nan)}, ValueError, "finite"),
        ({"adjacency": np.ones((30, 29))}, ValueError, r"\(30, 29\)"),
        ({"adjacency": np.full((30, 30), 1e39), "normalize": False}, ValueError, "1e.39, too large for float32"),
    ],
)
def test_errors_name_the_argument_and_the_value(weights, options, error, message):
    arguments = {"x": np.ones((30, 2), np.float32), "adjacency": weights} | options
    with pytest.raises(error, match=message):
        smooth(arguments.pop("x"), arguments.pop("adjacency"), **arguments)


def test_beta_may_have_any_real_scalar_type(weights):
    x = np.ones((30, 2), np.float32)
    expected = smooth(x, weights, beta=0.5)
    for beta in (np.float16(0.5), jnp.bfloat16(0.5), np.array(0.5), jnp.array(0.5)):
        np.testing.assert_array_equal(smooth(x, weights, beta=beta), expected)
    np.testing.assert_array_equal(smooth(x, weights, beta=0), x)


def test_too_many_entries_are_refused():
    class Huge:
        nnz = 2**31

    with pytest.raises(ValueError, match=r"adjacency has 2147483648 entries.*graph\.top_k"):
        _propagate.to_device(Huge(), np.float32)


def test_product_refuses_mixed_dtypes(weights):
    csr = _propagate.prepare(weights, np.float32, normalize=True)
    with pytest.raises(TypeError, match="one dtype, got data float32 and x bfloat16"):
        _propagate.propagate(csr, jnp.ones((30, 2), jnp.bfloat16))


def test_narrow_indices_of_a_traced_graph():
    """The number of nodes, 256, is one more than eight bits hold."""
    weights = graph.from_edges(np.arange(200), np.arange(1, 201), num_nodes=256)
    narrow = sparse.BCOO.fromdense(weights.todense(), index_dtype=jnp.uint8)
    x = jnp.arange(256.0)[:, None]
    np.testing.assert_allclose(jax.jit(propagate)(narrow, x), propagate(weights, x), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(smooth)(x, narrow), smooth(x, weights), rtol=1e-5)


def test_a_beta_that_is_one_in_float32_is_refused(weights):
    x = jnp.ones((weights.shape[0], 2), jnp.float32)
    with pytest.raises(ValueError, match=r"got 0.999999999, which is 1 in float32; take at most 0.99999988"):
        smooth(x, weights, beta=1 - 1e-9, method="exact")


def test_the_exact_form_of_nan_says_so(weights):
    x = jnp.ones((weights.shape[0], 2)).at[0, 0].set(jnp.nan)
    with pytest.warns(RuntimeWarning, match="x holds NaN or infinity"):
        smooth(x, weights, method="exact")
