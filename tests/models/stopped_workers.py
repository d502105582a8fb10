"""What a process of its own runs in the test of stopping several."""

from pathlib import Path

from models.training.interrupts import stop_gently


def work(folder: Path, index: int, workers: int) -> None:
    """Stands in for training: says that it has begun, and saves when it is told to stop."""
    with stop_gently() as asked:
        (folder / f"begun-{index}").touch()
        if asked.wait(60):
            (folder / f"saved-{index}").touch()
