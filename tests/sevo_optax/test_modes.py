"""The public surface under the modes in which people debug: without jit, and with a check for NaN after each step."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sevo_optax
from sevo_optax import (
    adamw_corrected,
    alignment,
    graph,
    propagate,
    residual,
    scale_by_adam_corrected,
    sevo,
    sevo_adam,
    sevo_adamw,
    sevo_sgd,
    smooth,
    smoothness,
    state_axes,
    with_graphs,
    without_graphs,
)

# Node 3 has no neighbours.
WEIGHTS = graph.from_edges([0, 1], [1, 2], [1.0, 3.0], num_nodes=4)
X = jnp.array([[1.0, 2.0], [0.5, -1.0], [0.0, 0.0], [-2.0, 1.0]])
METHODS = ("neumann", "iterative", "exact")


def steps(tx, x=X):
    """Three updates: one with an idle row, one of zeros, one jitted."""
    state, out = tx.init(x), []
    for grads in (x, x * 0):
        updates, state = tx.update(grads, state, x)
        out.append(updates)
    return [*out, jax.jit(tx.update)(x, state, x)]


def of_every_method(function):
    return lambda: [function(method) for method in METHODS]


def over_replicas():
    tx = sevo(WEIGHTS)
    axes = state_axes(tx.init(X))
    run = jax.vmap(tx.update, in_axes=(0, axes), out_axes=(0, axes))
    return run(jnp.stack([X, X + 1]), tx.init(X)._replace(count=jnp.zeros(2, jnp.int32)))


CASES = {
    "smooth": of_every_method(lambda method: smooth(X, WEIGHTS, method=method)),
    "smooth a zero": of_every_method(lambda method: smooth(X * 0, WEIGHTS, method=method)),
    "smooth in half precision": lambda: smooth(X.astype(jnp.bfloat16), WEIGHTS),
    "smooth, derivatives": lambda: jax.grad(lambda x, beta: jnp.sum(smooth(x, WEIGHTS, beta=beta) ** 2), (0, 1))(
        X, 0.9
    ),
    "smooth, batch": lambda: jax.vmap(lambda x: smooth(x, WEIGHTS))(jnp.stack([X, X + 1])),
    "smooth, jitted": of_every_method(lambda method: jax.jit(lambda x, a: smooth(x, a, method=method))(X, WEIGHTS)),
    "propagate": lambda: [propagate(WEIGHTS, X), jax.grad(lambda x: jnp.sum(propagate(WEIGHTS, x)))(X)],
    "residual": lambda: [residual(X, X, WEIGHTS), residual(X * 0, X * 0, WEIGHTS)],
    "smoothness": lambda: [smoothness(X, WEIGHTS), jax.grad(smoothness)(X, WEIGHTS)],
    "alignment": of_every_method(lambda method: alignment(X, WEIGHTS, method=method)),
    "alignment of a zero": lambda: [alignment(X * 0, WEIGHTS), jax.grad(alignment)(X * 0, WEIGHTS)],
    "sevo": of_every_method(lambda method: steps(sevo(WEIGHTS, method=method))),
    "scale_by_adam_corrected": lambda: steps(scale_by_adam_corrected()),
    "adamw_corrected": lambda: steps(adamw_corrected(0.1, nesterov=True)),
    "sevo_adamw": lambda: steps(sevo_adamw(0.1, WEIGHTS)),
    "sevo_adam": lambda: steps(sevo_adam(0.1, WEIGHTS)),
    "sevo_sgd": lambda: steps(sevo_sgd(0.1, WEIGHTS, momentum=0.9)),
    "gradient side": lambda: steps(optax.chain(sevo(WEIGHTS), adamw_corrected(0.1))),
    "state_axes": over_replicas,
    "without_graphs": lambda: without_graphs(sevo(WEIGHTS).init(X)),
    "with_graphs": lambda: with_graphs(without_graphs(sevo(WEIGHTS).init(X)), sevo(WEIGHTS).init(X)),
    "graph": lambda: [graph.normalize(WEIGHTS).todense(), graph.combine([WEIGHTS, WEIGHTS]).todense()],
}


@pytest.mark.parametrize("mode", [jax.disable_jit, jax.debug_nans], ids=["disable_jit", "debug_nans"])
@pytest.mark.parametrize("run", CASES.values(), ids=CASES)
def test_runs_and_agrees(run, mode):
    expected = run()
    with mode(True):
        actual = run()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-5, atol=1e-5
        ),
        actual,
        expected,
    )


def test_every_public_function_is_run():
    functions = {name for name in sevo_optax.__all__ if inspect.isfunction(getattr(sevo_optax, name))}
    assert functions <= set(CASES)


def test_debug_nans_still_finds_a_nan():
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        smooth(np.array([[np.nan], [0.0], [0.0], [0.0]], np.float32), WEIGHTS)
