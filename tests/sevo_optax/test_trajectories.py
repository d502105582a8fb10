"""Whole optimizers against whole trajectories: the published ones, where they lie beside this clone, and dense ones."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sevo_optax import sevo_adam, sevo_adamw, sevo_sgd
from tests.jax_names import enable_x64
from tests.sevo_optax import reference

PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "reference_trajectories.npz"
CASES = {
    # name: nodes, dim, steps, beta, layers, method, b1, b2, lr, weight decay
    "neumann_L3_b099": (40, 8, 12, 0.99, 3, "neumann", 0.9, 0.98, 1e-2, 0.1),
    "neumann_L1_b05_nowd": (25, 5, 9, 0.5, 1, "neumann", 0.9, 0.999, 1e-1, 0.0),
    "iterative_L2_b03": (30, 6, 10, 0.3, 2, "iterative", 0.8, 0.95, 1e-2, 0.01),
    "joint_two_tables": (45, 4, 10, 0.99, 3, "neumann", 0.9, 0.98, 1e-2, 0.05),
}
SPLIT = 18


def dense_case(name):
    """The same experiment on other random numbers, solved by the dense reference."""
    nodes, dim, steps, beta, num_layers, method, b1, b2, lr, decay = CASES[name]
    rng = np.random.default_rng(nodes)
    weights = reference.random_weights(rng, nodes, 0.2)
    params = rng.normal(size=(nodes, dim))
    grads = rng.normal(size=(steps, nodes, dim)) * (rng.random((steps, nodes, 1)) < 0.5)

    def psi(x):
        return reference.smooth(x, reference.normalize(weights), beta, num_layers, method)

    return {
        "weights": weights,
        "params0": params,
        "grads": grads,
        "params_adamw": reference.adamw_trajectory(params, grads, psi, lr, b1, b2, decay),
        "params_adam": reference.adam_trajectory(params, grads, psi, lr, b1, b2, decay),
        "params_sgd": reference.sgd_trajectory(params, grads, psi, lr, 0.9, decay),
        "lr": lr,
        "b1": b1,
        "b2": b2,
        "weight_decay": decay,
        "beta": beta,
        "num_layers": num_layers,
        "momentum": 0.9,
    }


def published_case(name):
    if not PUBLISHED.exists():
        pytest.skip(f"the published trajectories are not beside this clone: {PUBLISHED.name}")
    with np.load(PUBLISHED) as file:
        case = {key.split("/")[1]: file[key] for key in file if key.startswith(name + "/")}
    np.testing.assert_allclose(reference.normalize(case["weights"]), case.pop("adjacency"), atol=1e-15)
    return {key: value.item() if value.ndim == 0 else value for key, value in case.items()}


def optimizer(kind, case, method, tables):
    smoothing = {"beta": case["beta"], "num_layers": case["num_layers"], "method": method}
    lr, decay, weights = case["lr"], case["weight_decay"], case["weights"]
    if kind == "adamw":
        b1, b2 = case["b1"], case["b2"]
        return sevo_adamw(lr, weights, tables, b1=b1, b2=b2, weight_decay=decay, **smoothing)
    # PyTorch's Adam and SGD add the decay to the gradient.
    if kind == "adam":
        tx = sevo_adam(lr, weights, tables, b1=case["b1"], b2=case["b2"], **smoothing)
    else:
        tx = sevo_sgd(lr, weights, tables, momentum=case["momentum"], **smoothing)
    return optax.chain(optax.add_decayed_weights(decay), tx)


@pytest.mark.parametrize("source", [published_case, dense_case])
@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("name", CASES)
def test_trajectory(name, dtype, tolerance, kind, source):
    case = source(name)
    joint = name == "joint_two_tables"
    method = "iterative" if name.startswith("iterative") else "neumann"

    def tree(matrix):
        """Two tables whose alphabetical order is not their order in the graph, or one table."""
        return {"user": matrix[..., :SPLIT, :], "item": matrix[..., SPLIT:, :]} if joint else matrix

    with enable_x64(dtype == "float64"):
        tx = optimizer(kind, case, method, ("user", "item") if joint else None)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree(case["params0"]))
        grads = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree(case["grads"]))

        @jax.jit
        def run(params, state, grads):
            def step(carry, grad):
                params, state = carry
                updates, state = tx.update(grad, state, params)
                params = optax.apply_updates(params, updates)
                return (params, state), params

            return jax.lax.scan(step, (params, state), grads)[1]

        actual = run(params, tx.init(params), grads)
        expected = tree(case[f"params_{kind}"])
        for leaf, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert leaf.dtype == dtype
            np.testing.assert_allclose(leaf, wanted, rtol=0, atol=tolerance)
