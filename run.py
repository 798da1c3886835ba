"""One training run: its flags, its schedule, the head and tail of its loop, its checkpoint files.

A checkpoint is one safetensors file, written whole and then renamed, so that a kill at any moment leaves the
previous one. Run state (configuration, step, best value) is JSON in its header.
"""

import argparse
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
from common import UserError, check, commit, gather, is_main, place_rule, sum_over_ranks, trim_heap, world
from loading import load_checkpoint, load_weights
from sources.files import append, hold, keep_lines, release, write_tensors
from sources.headers import check_moments, check_resumable, check_same_step, sealed
from sources.logs import make_logger
from sources.signals import Stop


def add_training_flags(parser: argparse.ArgumentParser, run_name: str) -> None:
    """The flags that both training scripts take."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--steps", type=int, help="optimiser steps in all")
    group.add_argument("--batch-size", type=int, help="demonstration sets in a micro-batch, over all ranks")
    group.add_argument("--grad-accum", type=int, help="micro-batches in a step")
    group.add_argument("--lr", type=float, help="peak learning rate of AdamW")
    group.add_argument("--warmup", type=float, default=0.05, help="share of the steps with rising learning "
                                                                  "rate; after it, linear decay to zero")
    group.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; 0 = no clipping")
    group.add_argument("--grad-checkpoint", action="store_true", help="run each layer of the LLM again in "
                       "the backward pass instead of keeping its activations: less memory, more time")
    group.add_argument("--vector-start", choices=common.STARTS,
                       help="how the vectors start: the distiller's states as they are; brought to the "
                            "scale of the LLM's embeddings by a learned scalar; or a tenth of that, added to "
                            "D's last l token embeddings")
    group.add_argument("--elastic", action="store_true", help="draw each row's l among 8, 16, 32, ... and "
                       "--distill-len, so that one checkpoint serves every l up to that")
    group.add_argument("--max-segments", type=int, default=1, metavar="N",
                       help="cut the D of a step's rows into 1 to N segments, for --segments in evaluation")
    group = parser.add_argument_group("output")
    group.add_argument("--out-dir", help=f"folder of this run; default out/{run_name}")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out-dir")
    group.add_argument("--save-every", type=int, default=25, help="steps between checkpoints")
    group.add_argument("--eval-every", type=int, help="steps between evaluations; also evaluated are the "
                                                      "start and the last step")
    group.add_argument("--eval-queries", type=int, help="dev examples of a task to evaluate on; default: all")
    group.add_argument("--eval-tasks", type=int, help="meta-test tasks whose dev examples to evaluate on, "
                                                      "evenly spread; default: all")
    group.add_argument("--patience", type=int, help="stop after this many evaluations without a better one; "
                                                    "0 = never")


def training_rules(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Rules on the training flags, for `check`."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return [
        *common.at_least(args, 1, "steps", "batch_size", "grad_accum", "eval_every", "save_every",
                         "eval_queries", "eval_tasks"),
        (0 < args.lr < 1e6, f"--lr is {args.lr}; give a positive number below a million"),
        place_rule("--out-dir", f"{args.out_dir or common.OUT}/last.safetensors"),
        (0 <= args.warmup <= 1, f"--warmup is {args.warmup}; give a share between 0 and 1"),
        *common.finite(args, "clip"),
        (args.patience >= 0, f"--patience is {args.patience}; give 0 (never stop early) or more"),
        (not args.elastic or args.distill_len > 8, "--elastic draws l from 8 up; give --distill-len above 8"),
        (args.batch_size % ranks == 0,
         f"--batch-size {args.batch_size} cannot be shared by {ranks} ranks; give a multiple of {ranks}")]


def lr_at(step: int, steps: int, warmup: float, peak: float) -> float:
    """Learning rate of 0-based `step` of `steps`: linear rise over its share `warmup`, linear fall to zero.

    DEVIATION: the paper names no schedule.
    """
    rise = max(1, round(warmup * steps))
    return peak * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def make_optimizer(distiller: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW (Table 5), here with decay, but not of what has one dimension or none (norms, biases, gains)."""
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.01},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def save_checkpoint(path: Path, distiller: nn.Module, state: dict,
                    optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write distiller weights, optimiser moments and run state to one file, atomically."""
    tensors = {f"distiller.{name}": t.detach().contiguous() for name, t in distiller.state_dict().items()}
    if optimizer is not None:
        for name, p in distiller.named_parameters():
            for key, t in optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{name}.{key}"] = t.contiguous()
    write_tensors(path, tensors, sealed("state", state))


FIXED_FLAGS = ("k", "least_k", "seed", "batch_size", "grad_accum", "warmup", "clip", "window",
               "min_doc_len", "context_len", "queries_per_demo", "dtype", "llm_weights", "max_segments",
               "eval_tasks", "eval_queries", "eval_docs")


class Run:
    """One training run: its folder, optimiser, step, log, checkpoints and early stopping. Its loop:

        while True:
            if run.evaluation_due():            # at the start, every --eval-every steps, and at the end
                run.evaluated(metrics, text)
            if run.done():
                return run.finish(stage="...")
            run.begin_step()                    # sets the learning rate
            for rows in run.micro_batches(rows_of(run.step)):
                run.backward(loss, **named_losses)
            run.end_step(n_tokens)              # unscale, clip, step, log, save

    The folder holds last.safetensors (everything to resume), best.safetensors (weights) and metrics.jsonl.
    `state` is the JSON of both: model, flags, what it was trained on, step, last metrics, best value.

    Args:
        name: of the folder under out/ where --out-dir is not given. model: what loading.distiller_config
        returns. trained_on: {stage: what decides its result}, of each stage so far and, last, this one.
    """

    def __init__(self, name: str, args: argparse.Namespace, distiller: nn.Module, model: dict,
                 trained_on: dict):
        self.args, self.distiller, self.out_dir = args, distiller, Path(args.out_dir or common.OUT / name)
        self.device = next(distiller.parameters()).device
        self.optimizer = make_optimizer(distiller, args.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.dtype == "fp16")
        self.rank, self.ranks = world()
        self.state = {"model": model, "trained_on": trained_on, "flags": vars(args), "commit": commit(),
                      "step": 0, "evaluated": -1, "best": None, "bad_evaluations": 0, "metrics": {},
                      "notes": [], "ranks": self.ranks}
        self.out_dir.mkdir(parents=True, exist_ok=True)
        hold(self.out_dir, "--out-dir")
        last = self.out_dir / "last.safetensors"
        if last.exists() and args.resume:
            self.restore(last)
        elif last.exists():
            raise UserError(f"{self.out_dir} holds a run already; add --resume to go on with it, or give "
                            "another --out-dir")
        elif args.resume and is_main():
            print(f"note: --resume: {self.out_dir} holds no checkpoint; the run begins")
        check_same_step(self.out_dir, self.step)
        self.metrics = self.out_dir / "metrics.jsonl"
        if is_main():
            keep_lines(self.metrics, self.knows)
        self.logger = make_logger(args.log if is_main() else "none", self.out_dir, vars(args), self.step)
        self.stop = Stop(args.max_minutes)
        self.ddp = DistributedDataParallel(distiller) if self.ranks > 1 else distiller
        self.bar = tqdm(total=args.steps, initial=self.step, desc=name.split("-")[0], unit="step",
                        disable=not is_main())
        distiller.train()

    def knows(self, record: dict) -> bool:
        """Whether the checkpoint to go on from knows of this record of metrics.jsonl."""
        # an evaluation is logged before it is saved: one that was not saved will be made again
        is_evaluation = {"dev_option_ce", "heldout_kl"} & record.keys()
        until, step = self.state["evaluated"] if is_evaluation else self.step, record.get("step")
        return not isinstance(step, int) or step <= until

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint of the same model, data and flags; raises UserError where these differ."""
        tensors, saved = load_checkpoint(path)
        check_resumable(path, saved, self.state, FIXED_FLAGS)
        notes = [f"--{flag} was {was} and is {now} from step {saved['step']} on; the learning rate follows"
                 for flag in ("steps", "lr")
                 if (was := saved["flags"].get(flag)) != (now := self.state["flags"][flag])]
        for note in notes * is_main():
            print(f"note: {note}")
        load_weights(self.distiller, tensors, path)
        for name, p in self.distiller.named_parameters():
            prefix = f"optimizer.{name}."
            moments = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            check_moments(path, name, p.shape, moments)
            if moments:
                self.optimizer.state[p] = {k: t if k == "step" else t.to(p.device)
                                           for k, t in moments.items()}
        if scaler := saved.pop("scaler"):
            self.scaler.load_state_dict(scaler)
        own = {name: self.state[name] for name in ("flags", "commit")}
        self.state |= saved | own | {"notes": saved.get("notes", []) + notes}

    @property
    def step(self) -> int:
        return self.state["step"]

    def done(self) -> bool:
        """Whether all steps are made, or --patience evaluations in a row brought nothing better."""
        return self.step >= self.args.steps or 0 < self.args.patience <= self.state["bad_evaluations"]

    def begin_step(self) -> None:
        """Set the learning rate; seed what is random in a step (dropout): a resumed run draws the same."""
        args, self.started, self.losses = self.args, time.time(), {}
        torch.manual_seed(args.seed * 1_000_003 + self.step)
        if self.device.type == "cpu":
            trim_heap()
        self.segments = int(np.random.default_rng((args.seed, self.step, 1)).integers(args.max_segments)) + 1
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.step, args.steps, args.warmup, args.lr)
        self.optimizer.zero_grad(set_to_none=True)

    def micro_batches(self, rows: list[dict]) -> Iterator[list[dict]]:
        """This rank's share of a step's rows by micro-batch. DEVIATION, --elastic: the paper trains one l."""
        size, longest = self.args.batch_size, self.args.distill_len
        if self.args.elastic:
            lengths = [2 ** i for i in range(3, 20) if 2 ** i < longest] + [longest]
            drawn = np.random.default_rng((self.args.seed, self.step)).choice(lengths, len(rows)).tolist()
            rows = [row | {"length": length} for row, length in zip(rows, drawn, strict=True)]
        for first in range(0, len(rows), size):
            # under DDP, the last backward pass of a step exchanges the gradients of all
            self.ddp.require_backward_grad_sync = first + size >= len(rows)
            part = rows[first:first + size][self.rank::self.ranks]
            with common.attention_for(part, self.device):
                yield part

    def backward(self, loss: Tensor, **losses: Tensor) -> None:
        """Add the gradients of `loss`, a sum over this rank's micro-batch by the counts of the whole step;
        `losses` are its parts, for the log."""
        self.scaler.scale(loss * self.ranks).backward()  # DDP averages over ranks
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value.item()

    def end_step(self, n_tokens: int) -> None:
        """Unscale, clip, step; log the step; save every --save-every steps; stop where that was asked for."""
        *sums, stop = sum_over_ranks([*self.losses.values(), self.stop.asked()], self.device)  # any rank's
        losses = dict(zip(self.losses, sums, strict=True))
        self.require_finite("loss", sum(losses.values()))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.distiller.parameters(), self.args.clip or float("inf")).item()
        if self.scaler.get_scale() <= 1:  # a larger scale of fp16 may be too large: it falls, without a step
            self.require_finite("gradient's norm", norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.state["step"] += 1
        losses |= {"grad_norm": norm} if math.isfinite(norm) else {}
        self.log(**losses, tokens=n_tokens, seconds=round(time.time() - self.started, 3))
        self.bar.set_postfix_str(", ".join(f"{name} {value:.3f}" for name, value in losses.items()))
        self.bar.update()
        if self.step % self.args.save_every == 0 or stop:
            self.save()
        if stop:
            sum_over_ranks([0.0], self.device)  # until the file is there
            self.stop.leave(f"saved after step {self.step} of {self.args.steps}", "--resume")

    def require_finite(self, what: str, value: float) -> None:
        """Raise UserError, before anything is saved, unless a number of this step is finite."""
        check((math.isfinite(value), f"the {what} at step {self.step} is {value}; lower --lr, or use --dtype "
               f"fp32. {self.out_dir} is as saved last: --resume goes on there, with a new --lr if given"))

    def log(self, **record) -> None:
        """Append one record to metrics.jsonl."""
        if is_main():
            append(self.metrics, record := {"step": self.step, **record})
            self.logger(record)

    def save(self) -> None:
        """Write last.safetensors."""
        if is_main():
            for name, p in self.distiller.named_parameters():
                self.require_finite(f"sum of {name}", p.sum().item())
            save_checkpoint(self.out_dir / "last.safetensors", self.distiller,
                            self.state | {"scaler": self.scaler.state_dict()}, self.optimizer)

    def evaluation_due(self) -> bool:
        at = self.step % self.args.eval_every == 0 or self.step == self.args.steps
        return at and self.state["evaluated"] < self.step

    def evaluated(self, metrics: dict, text: str) -> None:
        """Log and print an evaluation; dev_option_ce, or, without tasks, heldout_kl decides what is best and
        when to stop early."""
        metrics = gather([metrics])[0]  # under --shard-llm each rank has made them, in its own rounding
        for name, value in metrics.items():
            self.require_finite(name, value)
        by = "dev_option_ce" if "dev_option_ce" in metrics else "heldout_kl"
        value = metrics[by]
        self.state |= {"evaluated": self.step, "metrics": metrics, "best_by": by}
        self.log(**metrics)
        if self.state["best"] is None or not value >= self.state["best"]:
            self.state |= {"best": value, "bad_evaluations": 0}
            if is_main():
                save_checkpoint(self.out_dir / "best.safetensors", self.distiller, self.state)
        else:
            self.state["bad_evaluations"] += 1
        self.save()
        if is_main():
            self.bar.write(f"step {self.step:6d} · {text}")

    def finish(self, **about: str) -> dict:
        """Print and return the run's final metrics after what `about` says of it."""
        self.bar.close()
        if self.step < self.args.steps and is_main():
            print(f"stopped early at step {self.step} of {self.args.steps}: --patience {self.args.patience}")
        self.stop.listen()
        release(self.out_dir)
        by = self.state.get("best_by", "dev_option_ce").removeprefix("dev_")
        return common.finish({**about, "steps": self.step, f"best_{by}": self.state["best"],
                              **self.state["metrics"], "out_dir": str(self.out_dir),
                              **common.peak_memory(self.device)})
