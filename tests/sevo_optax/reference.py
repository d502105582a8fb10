"""The paper in dense NumPy: slow, float64, and independent of the library."""

from collections.abc import Iterator

import numpy as np


def random_weights(rng: np.random.Generator, num_nodes: int, density: float = 0.3) -> np.ndarray:
    """Symmetric weights of very different sizes, with self-loops, one of the nodes without neighbours."""
    weights = np.exp(rng.normal(size=(num_nodes, num_nodes))) * (rng.random((num_nodes, num_nodes)) < density)
    weights = weights + weights.T
    alone = num_nodes // 2
    weights[alone] = weights[:, alone] = 0
    return weights


def normalize(weights: np.ndarray) -> np.ndarray:
    """D^-1/2 A D^-1/2; a node without neighbours keeps a zero row."""
    degree = weights.sum(axis=1)
    scale = np.zeros_like(degree)
    scale[degree > 0] = degree[degree > 0] ** -0.5
    return scale[:, None] * weights * scale


def smooth(
    x: np.ndarray,
    adjacency: np.ndarray,
    beta: float,
    num_layers: int = 3,
    method: str = "neumann",
    rescale: bool = True,
) -> np.ndarray:
    """Eq. 5, 6, 7 and the iterative form, by matrix powers and a matrix inverse."""
    if method == "exact":
        return (1 - beta) * np.linalg.solve(np.eye(len(x)) - beta * adjacency, x)
    if method == "iterative":
        out = x
        for _ in range(num_layers):
            out = beta * adjacency @ out + (1 - beta) * x
        return out
    powers = [np.linalg.matrix_power(adjacency, layer) for layer in range(num_layers + 1)]
    out = (1 - beta) * sum(beta**layer * power for layer, power in enumerate(powers)) @ x
    return out / (1 - beta ** (num_layers + 1)) if rescale else out


def smoothness(x: np.ndarray, adjacency: np.ndarray) -> float:
    """Tr(Xᵀ (I - Ã) X)."""
    return float(np.trace(x.T @ (np.eye(len(x)) - adjacency) @ x))


def adam_directions(
    grads: np.ndarray,
    b1: float,
    b2: float,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    corrected: bool = False,
) -> Iterator[np.ndarray]:
    """The direction of Adam after each step; with Eq. 9 and 10 for rows of zeros if ``corrected``."""
    m = np.zeros_like(grads[0])
    v = np.zeros_like(grads[0])
    for t, g in enumerate(grads, start=1):
        square = g**2
        if corrected:
            idle = (g == 0).all(axis=1)
            last = max(1, t - 1)
            g = np.where(idle[:, None], m / (1 - b1**last), g)
            square = np.where(idle[:, None], v / (1 - b2**last), square)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * square
        yield (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t) + eps_root) + eps)


def adamw_trajectory(params, grads, psi, lr, b1, b2, weight_decay):
    """Algorithm 1: the parameters after each step."""
    out = []
    for direction in adam_directions(grads, b1, b2, corrected=True):
        params = params - lr * psi(direction) - lr * weight_decay * params
        out.append(params)
    return np.stack(out)


def adam_trajectory(params, grads, psi, lr, b1, b2, weight_decay):
    """Algorithm 3, the decay added to the gradient."""
    out, seen = [], []
    for g in grads:
        seen.append(g + weight_decay * params)
        *_, direction = adam_directions(np.stack(seen), b1, b2)
        params = params - lr * psi(direction)
        out.append(params)
    return np.stack(out)


def sgd_trajectory(params, grads, psi, lr, momentum, weight_decay):
    """Algorithm 2, the decay added to the gradient."""
    out, trace = [], np.zeros_like(params)
    for g in grads:
        trace = momentum * trace + g + weight_decay * params
        params = params - lr * psi(trace)
        out.append(params)
    return np.stack(out)
