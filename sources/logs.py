"""Curves where people look: what metrics.jsonl gets also goes to TensorBoard or Weights & Biases, by --log.

    python train_finetune.py --log tensorboard && tensorboard --logdir out
    python train_finetune.py --log wandb                    # WANDB_MODE=offline keeps it here

metrics.jsonl stays what a run goes on from. A logger that fails, for want of a network or a disk, is told
once and left out: it never ends or changes a training.
"""

import contextlib
import secrets
from collections.abc import Callable
from pathlib import Path

from sources.files import write_whole


def make_logger(kind: str, folder: Path, flags: dict, step: int) -> Callable[[dict], None]:
    """What takes each record of a run's metrics.jsonl, {"step": ..., name: number}.

    Args:
        kind: of --log. folder: of the run; flags: its flags. step: the run goes on from here: what an earlier
            process logged of later steps, which are made again, is dropped or written over.
    """
    with guarded(kind):
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

            def to_tensorboard(record: dict) -> None:
                for name, value in record.items():
                    if name != "step":
                        writer.add_scalar(name, value, record["step"])
                writer.flush()
            return safe(kind, to_tensorboard)
        if kind == "wandb":
            import wandb
            kept = folder / "wandb-id"
            if not kept.exists():
                write_whole(kept, secrets.token_hex(4))
            run = wandb.init(project="mend", name=folder.name, id=kept.read_text(), resume="allow",
                             config=flags, dir=str(folder))
            return safe(kind, lambda record: run.log({n: v for n, v in record.items() if n != "step"},
                                                     step=record["step"]))
    return lambda record: None


def safe(kind: str, log: Callable[[dict], None]) -> Callable[[dict], None]:
    """`log` until it fails once."""
    broken = False

    def once(record: dict) -> None:
        nonlocal broken
        if not broken:
            broken = True
            with guarded(kind):
                log(record)
                broken = False
    return once


@contextlib.contextmanager
def guarded(kind: str):
    """A fault inside is told as a note."""
    try:
        yield
    except Exception as error:  # whatever a client raises, the training goes on
        what = f"{type(error).__name__}: {str(error)[:200]}"
        print(f"note: --log {kind} stopped ({what}); metrics.jsonl goes on")
