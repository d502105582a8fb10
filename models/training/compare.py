"""Training the same model with several optimizers on the same data and seed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from models.training.config import OPTIMIZERS, TrainConfig
from models.training.files import read_history, write_json
from models.training.loop import Prepared, Result, train


def compare(prepared: Prepared, config: TrainConfig, output_dir: Path) -> list[Result]:
    """Trains one model an optimizer, one after the other.

    Args:
      prepared: the data.
      config: the run.
      output_dir: where each run gets a folder, and ``compare.json`` and ``compare.png`` appear at the end.

    Returns:
      One result an optimizer, plain AdamW first.
    """
    results = [train(prepared, config, optimizer, output_dir / optimizer) for optimizer in OPTIMIZERS]
    curves = {
        result.optimizer: [
            (record["epoch"], record["validation"]["NDCG@10"])
            for record in read_history(output_dir / result.optimizer / "history.jsonl")
            if "validation" in record
        ]
        for result in results
    }
    from models import plots  # matplotlib is slow to import and not needed to train

    source = "embedded data" if config.data is None else config.data.stem
    plots.validation_curves(curves, output_dir / "compare.png", title=f"{config.model} on {source}")
    write_json(output_dir / "compare.json", [dataclasses.asdict(result) for result in results])
    return results


def table(results: Sequence[Result]) -> str:
    """Test metrics, one optimizer a line, with the relative gain in NDCG@10 over the first."""
    names = list(results[0].test)
    base = results[0].test["NDCG@10"]
    lines = [["optimizer", *names, "gain", "best epoch", "s/epoch"]]
    for result in results:
        gain = f"{result.test['NDCG@10'] / base - 1:+.1%}" if result is not results[0] and base else ""
        values = [f"{result.test[name]:.4f}" for name in names]
        lines.append([result.optimizer, *values, gain, str(result.best_epoch), f"{result.epoch_seconds:.2f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
