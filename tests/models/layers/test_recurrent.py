import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.layers import GRU
from tests.models.architectures.checks import by_path, check_gradient, count_parameters, perturb, widen

ROWS, LENGTH, IN, OUT = 3, 6, 5, 4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(parameters, x, segments):
    """The equations, one row, token and gate at a time."""
    zero = np.zeros(3 * OUT)
    w, u = parameters["in_kernel"], parameters["state_kernel"]
    b, c = parameters.get("in_bias", zero), parameters.get("state_bias", zero)
    reset, update, new = (slice(i * OUT, (i + 1) * OUT) for i in range(3))
    states = np.zeros((*x.shape[:2], OUT))
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            begins = t == 0 or segments[row, t] != segments[row, t - 1]
            h = np.zeros(OUT) if begins else states[row, t - 1]
            r, z = (sigmoid(x[row, t] @ w[:, g] + b[g] + h @ u[:, g] + c[g]) for g in (reset, update))
            n = np.tanh(x[row, t] @ w[:, new] + b[new] + r * (h @ u[:, new] + c[new]))
            states[row, t] = (1 - z) * n + z * h
    return states


@pytest.fixture
def inputs():
    x = np.random.default_rng(1).normal(size=(ROWS, LENGTH, IN))
    segments = np.array([[1, 1, 1, 2, 2, 0], [3, 3, 3, 3, 3, 3], [0, 0, 4, 5, 5, 5]], np.int32)
    return x, segments


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.usefixtures("x64")
def test_states_and_gradient_are_the_equations(inputs, use_bias):
    x, segments = inputs
    gru = widen(perturb(GRU(IN, OUT, use_bias=use_bias, rngs=nnx.Rngs(0))))
    parameters = by_path(nnx.state(gru))
    np.testing.assert_allclose(gru(jnp.asarray(x), segments), reference(parameters, x, segments), rtol=1e-12)
    graphdef, state = nnx.split(gru)

    def loss(state, x):
        return jnp.sum(jnp.sin(3 * nnx.merge(graphdef, state)(x, segments)))

    def numpy_loss(parameters):
        given = parameters.get("x", x)
        return np.sin(3 * reference(parameters, given, segments)).sum()

    gradient, x_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(state, jnp.asarray(x))
    check_gradient(by_path(gradient) | {"x": np.asarray(x_gradient)}, numpy_loss, parameters | {"x": x})


def test_one_segment_a_row_is_a_cell_after_another(inputs):
    x, _ = inputs
    gru = GRU(IN, OUT, use_bias=False, rngs=nnx.Rngs(0))
    cell = nnx.GRUCell(IN, OUT, rngs=nnx.Rngs(1))
    cell.dense_i.kernel[...], cell.dense_h.kernel[...] = gru.in_kernel[...], gru.state_kernel[...]
    expected = nnx.RNN(cell)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(gru(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-6)


def test_parameters():
    gru = GRU(64, 64, use_bias=False, rngs=nnx.Rngs(0))
    assert count_parameters(gru) == 24_576
    assert count_parameters(GRU(IN, OUT, rngs=nnx.Rngs(0))) == 3 * OUT * (IN + OUT + 2)
    for kernel in (gru.in_kernel[...], gru.state_kernel[...]):
        bound = np.sqrt(6 / (64 + 3 * 64))  # xavier-uniform of the three gates as one matrix
        assert 0.99 * bound < np.abs(kernel).max() <= bound
        assert np.std(kernel) == pytest.approx(bound / np.sqrt(3), rel=0.02)


def test_half_precision(inputs):
    x, segments = inputs
    gru = perturb(GRU(IN, OUT, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(gru)

    def loss(state, x):
        states = nnx.merge(graphdef, state)(x, segments)
        return jnp.sum(jnp.sin(3 * states.astype(jnp.float32))), states

    def run(dtype):
        (_, states), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state, jnp.asarray(x, dtype))
        return states, by_path(gradient)

    (states, gradient), (expected, expected_gradient) = run(jnp.bfloat16), run(jnp.float32)
    assert states.dtype == jnp.bfloat16
    np.testing.assert_allclose(states.astype(np.float32), expected, atol=0.03)
    for path, value in gradient.items():
        assert value.dtype == np.float32
        scale = np.abs(expected_gradient[path]).max()
        np.testing.assert_allclose(value, expected_gradient[path], atol=0.05 * scale, err_msg=path)
