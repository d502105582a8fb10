"""MF-BPR and LightGCN in NumPy, float64, written from their equations: scores, losses and gradients."""

import numpy as np


def adjacency(interactions):
    """D^-1/2 A D^-1/2 of the binary graph of users and item rows, dense, pair by pair."""
    users, rows = interactions.num_users, interactions.num_items + 1
    matrix = np.zeros((users + rows, users + rows))
    for user, items in enumerate(interactions):
        for item in items:
            matrix[user, users + item] = matrix[users + item, user] = 1
    degree = matrix.sum(axis=1)
    for i, j in zip(*np.nonzero(matrix), strict=True):
        matrix[i, j] /= np.sqrt(degree[i] * degree[j])
    return matrix


def propagation(matrix, num_layers):
    """The matrix that maps stacked embeddings to their mean over the layers 0 … num_layers."""
    power = total = np.eye(len(matrix))
    for _ in range(num_layers):
        power = matrix @ power
        total = total + power
    return total / (num_layers + 1)


def bpr(user_table, item_table, users, positives, negatives, *, mean=None, l2_weight=0.0):
    """The mean BPR loss of pairs whose positive is not 0, with L2 on the rows of the batch, and its two gradients.

    Args:
      user_table: shape (users, dim), before propagation.
      item_table: shape (rows, dim), likewise.
      users: shape (pairs,).
      positives: shape (pairs,).
      negatives: shape (pairs,).
      mean: what :func:`propagation` returned; None: nothing is propagated.
      l2_weight: factor of half the squares, per pair.
    """
    stacked = np.concatenate([user_table, item_table]).astype(np.float64)
    mean = np.eye(len(stacked)) if mean is None else mean
    final, offset = mean @ stacked, len(user_table)
    final_gradient, own_gradient = np.zeros_like(final), np.zeros_like(final)
    counted = [k for k in range(len(users)) if positives[k]]
    loss = 0.0
    for k in counted:
        u, i, j = users[k], offset + positives[k], offset + negatives[k]
        margin = final[u] @ (final[i] - final[j])
        loss += np.log1p(np.exp(-margin))
        slope = -1 / (1 + np.exp(margin))
        final_gradient[u] += slope * (final[i] - final[j])
        final_gradient[i] += slope * final[u]
        final_gradient[j] -= slope * final[u]
        for row in (u, i, j):
            loss += l2_weight / 2 * (stacked[row] ** 2).sum()
            own_gradient[row] += l2_weight * stacked[row]
    gradient = (mean.T @ final_gradient + own_gradient) / len(counted)
    return loss / len(counted), gradient[:offset], gradient[offset:]
