"""Pictures of runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt

# Colours that stay apart for colour-blind readers, one an optimizer everywhere.
COLORS = {"adamw": "#7f7f7f", "sevo-adamw": "#0072b2", "sevo-gradient": "#d55e00"}


def validation_curves(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path, *, title: str = "") -> None:
    """Draws NDCG@10 on the validation items over epochs.

    Args:
      curves: by name, points (epoch, NDCG@10).
      path: the PNG to write.
      title: what was trained on what.
    """
    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in curves.items():
        epochs, values = zip(*points, strict=True)
        best = max(range(len(values)), key=values.__getitem__)
        (line,) = ax.plot(epochs, values, label=name, color=COLORS.get(name), linewidth=2)
        ax.plot(epochs[best], values[best], "o", color=line.get_color())
    ax.set(xlabel="epoch", ylabel="validation NDCG@10", title=title)
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower right")
    partial = path.with_name(path.name + ".partial")
    fig.savefig(partial, format="png", dpi=150)
    plt.close(fig)
    partial.replace(path)
