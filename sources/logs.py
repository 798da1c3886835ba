"""Curves where people look: what metrics.jsonl gets also goes to TensorBoard or Weights & Biases, by --log.

    python train_finetune.py --log tensorboard && tensorboard --logdir out
    python train_finetune.py --log wandb                    # WANDB_MODE=offline keeps it here

metrics.jsonl stays what a run goes on from. A logger that fails, for want of a network or a disk, is told
once and left out: it never ends or changes a training. Where a killed run makes steps again, TensorBoard
shows the later values; wandb keeps the earlier ones, as it takes no step before its last, and lacks an
evaluation that the kill came before: that one is in metrics.jsonl alone.
"""

import contextlib
import json
import secrets
from collections.abc import Callable
from pathlib import Path

from sources.files import write_whole


def make_logger(kind: str, folder: Path, flags: dict, step: int) -> Callable[[dict], None]:
    """What takes each record of a run's metrics.jsonl, {"step": ..., name: number}.

    Args:
        kind: of --log. folder: of the run, with the metrics.jsonl that it goes on from; flags: its flags.
        step: the run goes on after it; what an earlier process logged of later ones will be made again.
    """
    with guarded(kind):
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            # this step goes too, as its evaluation may be made again; what metrics.jsonl has of it comes back
            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

            def to_tensorboard(record: dict) -> None:
                for name, value in record.items():
                    if name != "step":
                        writer.add_scalar(name, value, record["step"])
                writer.flush()
            metrics = folder / "metrics.jsonl"
            for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
                if (record := json.loads(line))["step"] == step:
                    to_tensorboard(record)
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
