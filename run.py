"""One training run: its flags, its schedule, its loop's head and tail, its checkpoint files.

A checkpoint is one safetensors file, written whole and then renamed, so that a kill at any moment leaves the previous one.
Run state (configuration, step, best value) is JSON in its header.
"""

import argparse
import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import common
from common import UserError, check, commit, is_main, place_rule, trim_heap


def add_training_flags(parser: argparse.ArgumentParser, run_name: str) -> None:
    """The flags that both training scripts take."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--steps", type=int, help="optimiser steps in all")
    group.add_argument("--batch-size", type=int, help="demonstration sets in a micro-batch, over all ranks")
    group.add_argument("--grad-accum", type=int, help="micro-batches in a step")
    group.add_argument("--lr", type=float, help="peak learning rate of AdamW")
    group.add_argument("--warmup", type=float, default=0.05, help="share of the steps with rising learning rate; "
                                                                  "after it, linear decay to zero")
    group.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; 0 = no clipping")
    group.add_argument("--grad-checkpoint", action="store_true", help="run each layer of the LLM again in the backward pass "
                       "instead of keeping its activations: less memory, more time")
    group.add_argument("--vector-start", choices=("plain", "matched", "residual"),
                       help="how the vectors start: the distiller's states as they are; brought to the scale of the LLM's "
                            "embeddings by a learned scalar; or a tenth of that, added to D's last l token embeddings")
    group = parser.add_argument_group("output")
    group.add_argument("--out-dir", help=f"folder of this run; default out/{run_name}")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out-dir, if any")
    group.add_argument("--save-every", type=int, default=25, help="steps between checkpoints")
    group.add_argument("--eval-every", type=int, help="steps between evaluations; the start and the last step "
                       "are always evaluated")
    group.add_argument("--patience", type=int, help="stop after this many evaluations without a better one; 0 = never")


def training_rules(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Rules on the training flags, for `check`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return [
        *common.at_least(args, 1, "steps", "batch_size", "grad_accum", "eval_every", "save_every"),
        (args.lr > 0, f"--lr is {args.lr}; give a positive number"),
        place_rule("--out-dir", f"{args.out_dir or common.OUT}/last.safetensors"),
        (0 <= args.warmup <= 1, f"--warmup is {args.warmup}; give a share between 0 and 1"),
        (args.clip >= 0, f"--clip is {args.clip}; give 0 (off) or a positive number"),
        (args.patience >= 0, f"--patience is {args.patience}; give 0 (never stop early) or more"),
        (args.batch_size % world == 0,
         f"--batch-size {args.batch_size} cannot be shared by {world} ranks; give a multiple of {world}"),
    ]


def lr_at(step: int, steps: int, warmup: float, peak: float) -> float:
    """Learning rate of 0-based `step` out of `steps`: linear rise over the first share `warmup`, linear fall to zero.

    DEVIATION: the paper names no schedule.
    """
    rise = max(1, round(warmup * steps))
    return peak * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def make_optimizer(distiller: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW as in Table 5, without weight decay on tensors of one dimension or none (norms, biases, gains)."""
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.01},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def sync_if(module: nn.Module, last: bool):
    """Under DDP, exchange gradients only in the last micro-batch of a step."""
    return module.no_sync() if hasattr(module, "no_sync") and not last else contextlib.nullcontext()


def finite(loss: float, step: int) -> float:
    if not torch.isfinite(torch.tensor(loss)):
        raise UserError(f"the loss at step {step} is {loss}; lower --lr, or use --dtype fp32 (or bf16 instead of fp16)")
    return loss


def save_checkpoint(path: Path, distiller: nn.Module, state: dict, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write distiller weights, optimiser moments and run state to one file, atomically."""
    tensors = {f"distiller.{name}": t.detach().contiguous() for name, t in distiller.state_dict().items()}
    if optimizer is not None:
        for name, p in distiller.named_parameters():
            for key, t in optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{name}.{key}"] = t.contiguous()
    write_checkpoint(path, tensors, state)


def write_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """One file, written whole and then renamed, with the state in its header."""
    write_tensors(path, tensors, {"state": json.dumps(state)})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, written whole and then renamed; raises UserError where nothing can be written."""
    from safetensors.torch import save_file
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}); give another place, or make room there") from error


def export_checkpoint(source: str | Path, target: Path) -> None:
    """Write a run's distiller to a file of its own, to be published: weights in bf16, no optimiser, and nothing that names
    this machine's folders: of the flags the numbers only, and of a distiller's folder its name."""
    def name_only(values: dict) -> dict:
        return {k: Path(v).name if isinstance(v, str) and Path(v).is_absolute() else v for k, v in values.items()}
    tensors, state = load_checkpoint(source)
    weights = {name: t.to(torch.bfloat16) for name, t in tensors.items() if name.startswith("distiller.")}
    needed = ("trained_on", "commit", "step", "figures")
    check((not {*needed, "model"} - state.keys(), f"{source} is not a whole checkpoint of this project; give a run's folder"))
    kept = {name: state[name] for name in needed}
    backbone = state["model"]["backbone"]
    kept["model"] = name_only(state["model"]) | {"backbone": backbone and name_only(backbone)}
    kept["flags"] = {name: value for name, value in state.get("flags", {}).items() if type(value) in (int, float)}
    write_checkpoint(target, weights, kept)


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu",
                    weights: bool = True) -> tuple[dict[str, Tensor], dict]:
    """Read (tensors, state) of a checkpoint file, or of the best (else last) one in a run's folder; without `weights`
    only the state."""
    from safetensors import safe_open
    path = checkpoint_file(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            names = file.keys() if weights else ()
            return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["state"])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a whole checkpoint of this project ({error}); take another one, or train "
                        "again") from error


def checkpoint_id(path: str | Path) -> str:
    """A checkpoint's name in results: its run folder and the first digits of its content hash."""
    file = checkpoint_file(path)
    return f"{file.resolve().parent.name}/{file.stem}@{hashlib.sha256(file.read_bytes()).hexdigest()[:10]}"


def checkpoint_file(path: str | Path) -> Path:
    """A checkpoint file itself, or best.safetensors, else last.safetensors, of a run's folder."""
    path = Path(path)
    for candidate in (path, path / "best.safetensors", path / "last.safetensors"):
        if candidate.is_file():
            return candidate
    raise UserError(f"no checkpoint at {path}: expected a .safetensors file, or a folder with best.safetensors or "
                    "last.safetensors in it, as train_pretrain.py and train_finetune.py write them")


FIXED_FLAGS = ("k", "seed", "batch_size", "grad_accum", "lr", "warmup", "clip", "window", "min_doc_len", "context_len",
               "queries_per_demo", "dtype", "llm_weights")


class Run:
    """Bookkeeping of one training run: its folder, step, learning rate, log, checkpoints and early stopping.

    The folder holds last.safetensors (everything to resume), best.safetensors (weights), and metrics.jsonl. `state` is
    the JSON of both checkpoints: model, flags, what it was trained on, step, figures of the last and best evaluation.
    """

    def __init__(self, out_dir: Path, args: argparse.Namespace, distiller: nn.Module, optimizer: torch.optim.Optimizer,
                 scaler: torch.amp.GradScaler, model: dict, trained_on: dict):
        self.out_dir, self.distiller, self.optimizer, self.scaler = out_dir, distiller, optimizer, scaler
        self.state = {"model": model, "trained_on": trained_on, "flags": vars(args), "commit": commit(), "step": 0,
                      "evaluated": -1, "best": None, "bad_evaluations": 0, "figures": {}}
        last = out_dir / "last.safetensors"
        if last.exists() and args.resume:
            self.restore(last)
        elif last.exists():
            raise UserError(f"{out_dir} holds a run already; add --resume to go on with it, or give another --out-dir")
        if is_main():
            self.metrics = out_dir / "metrics.jsonl"
            out_dir.mkdir(parents=True, exist_ok=True)
            kept, before = [], self.metrics.read_text() if self.metrics.exists() else None
            for line in (before or "").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a kill may have cut the last line
                    record = json.loads(line)
                    # an evaluation is logged before it is saved: one that was not saved will be made again
                    until = self.state["evaluated"] if "val_kl" in record else self.step
                    kept += [line] if record["step"] <= until else []
            text = "".join(f"{line}\n" for line in kept)
            if text != before:  # several commands may look at a finished run
                self.metrics.write_text(text)

    def restore(self, path: Path) -> None:
        tensors, saved = load_checkpoint(path)
        fixed = [state["model"] | {f"{stage} {name}": value for name, value in about.items()} |
                 {f"--{name.replace('_', '-')}": state["flags"][name] for name in FIXED_FLAGS if name in state["flags"]}
                 for state in (saved, self.state) for stage, about in list(state["trained_on"].items())[-1:]]
        differ = [f"{name} {str(fixed[0].get(name))[:60]} (now {str(fixed[1].get(name))[:60]})"
                  for name in fixed[0] | fixed[1] if fixed[0].get(name) != fixed[1].get(name)]
        check((not differ, (f"--resume: {path} was trained with {', '.join(differ)}; give the flags of that run, or another "
                            "--out-dir")))
        before, now = (state["flags"].get("steps") for state in (saved, self.state))
        if before != now and is_main():
            print(f"note: --steps was {before} and is {now}: from here on the learning rate follows the new schedule")
        self.distiller.load_state_dict({k.removeprefix("distiller."): t for k, t in tensors.items()
                                        if k.startswith("distiller.")})
        for name, p in self.distiller.named_parameters():
            prefix = f"optimizer.{name}."
            moments = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            if moments:
                self.optimizer.state[p] = {k: t if k == "step" else t.to(p.device) for k, t in moments.items()}
        if scaler := saved.pop("scaler"):
            self.scaler.load_state_dict(scaler)
        self.state = saved | {"flags": self.state["flags"], "commit": self.state["commit"]}

    @property
    def step(self) -> int:
        return self.state["step"]

    def done(self, steps: int, patience: int) -> bool:
        """Whether all steps are made, or `patience` evaluations in a row brought nothing better."""
        return self.step >= steps or 0 < patience <= self.state["bad_evaluations"]

    def begin_step(self, args: argparse.Namespace) -> None:
        """Set the learning rate, and seed what is random in a step (dropout), so that a resumed run draws the same."""
        torch.manual_seed(args.seed * 1_000_003 + self.step)
        if next(self.distiller.parameters()).device.type == "cpu":
            trim_heap()
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.step, args.steps, args.warmup, args.lr)
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, clip: float) -> float:
        """Unscale, clip, step the optimiser; returns the gradient norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.distiller.parameters(), clip or float("inf")).item()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.state["step"] += 1
        return norm

    def log(self, **record) -> None:
        """Append one record to metrics.jsonl."""
        if is_main():
            with self.metrics.open("a") as file:
                file.write(json.dumps({"step": self.step, **record}) + "\n")

    def save(self) -> None:
        """Write last.safetensors."""
        if is_main():
            save_checkpoint(self.out_dir / "last.safetensors", self.distiller,
                            self.state | {"scaler": self.scaler.state_dict()}, self.optimizer)

    def evaluation_due(self, every: int, steps: int) -> bool:
        return self.state["evaluated"] < self.step and (self.step % every == 0 or self.step == steps)

    def evaluated(self, figures: dict, value: float) -> None:
        """Log an evaluation; `value` (lower is better) decides what is best and when to stop early."""
        self.state |= {"evaluated": self.step, "figures": figures}
        self.log(**figures)
        if self.state["best"] is None or value < self.state["best"]:
            self.state |= {"best": value, "bad_evaluations": 0}
            if is_main():
                save_checkpoint(self.out_dir / "best.safetensors", self.distiller, self.state)
        else:
            self.state["bad_evaluations"] += 1
        self.save()
