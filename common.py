"""What every script shares: presets, flags and their rules, faults, the hub, devices, precision and ranks.

Imports nothing of this project. A user's fault is a UserError: one paragraph on standard error, exit code 2.
"""

import argparse
import contextlib
import ctypes
import datetime
import difflib
import functools
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent
ASSETS = ROOT / "assets"
CACHE = ROOT / "cache"
OUT = ROOT / "out"
SPLITS = ("class_to_class", "non_class_to_class", "qa_to_qa", "non_qa_to_qa", "non_nli_to_nli", "hr_to_lr",
          "non_para_to_para")
FUNCTIONS = "functions"  # not the paper's: what only demonstrations define (BIG-bench); meta-test tasks alone
# Values of the flags that are not given. A script adds its own to these.
PRESETS = {
    "paper": {"llm": "gpt2-large", "distiller": "gpt2", "distill_len": 100, "corpus": ["c4"],
              "tasks": ["metaicl"], "k": 16, "vector_start": "matched"},
    "pocket": {"llm": str(ASSETS / "SmolLM2-135M-Instruct"), "distiller": "layers:6", "distill_len": 32,
               "corpus": ["sotu"], "tasks": ["bigbench"], "k": 16, "vector_start": "residual"},
}


class UserError(ValueError):
    """A fault in what the user gave: says what was found, what was expected and what to do."""


def run_main(main) -> None:
    """Run a script's main(); a user's fault becomes one paragraph on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be UTF-8
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun's report, which comes last, shows it
            with contextlib.suppress(OSError):
                get_error_handler().record_exception(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; what was written before stays", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # of standard output, or of a folder that vanished meanwhile
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


SEEDS = (100, 13, 21, 42, 87)  # MetaICL's five draws of demonstrations
TEMPLATES = ("space", "newline", "input-output", "chat")
STARTS = ("plain", "matched", "residual")  # of vectors
FLAGS = {  # those that more than one script takes; a default of None is filled in by the preset (see `parse`)
    "preset": dict(choices=sorted(PRESETS),
                   help="values for flags that are not given; default: paper where CUDA is, else pocket"),
    "llm": dict(help="frozen LLM: a hub name or a folder"),
    "distiller": dict(help="a hub name or folder of the same tokenizer family, layers:N for the LLM's own "
                           "first N layers, kv:R for keys and values in place of input vectors "
                           "(variants.py; R: the adapters' rank), or free for free vectors "
                           "(PromptTuning)"),
    "distill-len": dict(type=int, help="l, number of distilled vectors; a checkpoint brings its own"),
    "segments": dict(type=number_or_auto, default=1, metavar="N|auto",
                     help="distil D in so many segments and join their vectors; auto: as many as its "
                          "demonstrations fill at --context-len tokens each"),
    "tasks": dict(nargs="+", help="one or more of metaicl (hub), bigbench (assets), functions, early, recall "
                  "(made on the spot), or your own: files, folders, data sets (docs/own.md); training "
                  "draws from each as often"),
    "corpus": dict(nargs="+", help="c4 (hub), sotu (assets), or folders / .jsonl[.gz] / .txt files"),
    "split": dict(default="class_to_class", help="task partition, meta-train to meta-test: "
                  f"{', '.join(SPLITS)}; or {FUNCTIONS}: what only demonstrations define (BIG-bench); or "
                  "a file FILE.json of own tasks"),
    "train-tasks": dict(nargs="+", metavar="TASK", help="own meta-training tasks, names or globs; default: "
                        "what --test-tasks leaves"),
    "test-tasks": dict(nargs="+", metavar="TASK", help="own meta-test tasks, names or globs; default: what "
                       "--train-tasks leaves"),
    "columns": dict(nargs="+", metavar="NAME=COLUMN", help="where own tasks have input, output and options, "
                    "as in input=text output=label"),
    "k": dict(type=int, help="K, demonstrations in a set"),
    "template": dict(choices=TEMPLATES,
                     help="what separates input, answer and demonstrations (Tab. 7: newline); input-output "
                          "writes 'Input: ' and 'Output: ' before them; chat: the tokenizer's own chat "
                          "template, with newlines in the user's turn; default: space, the paper's; "
                          "where a checkpoint is evaluated, its own"),
    "seed": dict(type=int, default=100, help="seed of sampling and initialisation"),
    "max-minutes": dict(type=float, help="stop after these minutes as SIGTERM does, with exit code 124; "
                        "default: no limit"),
    "device": dict(default="auto", help="auto (CUDA, else CPU), cpu, cuda, cuda:1, ..., mps (a Mac's GPU, "
                   "untried)"),
    "dtype": dict(choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                  help="of the LLM and the distiller's autocast (its weights stay fp32); auto: on CUDA bf16, "
                       "else fp16; on mps fp32; on a CPU fp32, but bf16 for training where the CPU has it in "
                       "hardware"),
    "shard-llm": dict(action="store_true", help="share the frozen LLM's layers out over torchrun's ranks"),
    "log": dict(choices=("none", "tensorboard", "wandb"), default="none",
                help="where the curves go beside metrics.jsonl"),
    # DEVIATION: Table 5 keeps GPT-2 in 8 bit; here it is a choice, as CUDA or bitsandbytes may be missing.
    "llm-weights": dict(choices=("fp32", "bf16", "8bit"), help="keep the frozen LLM in this instead of "
                        "--dtype; 8bit needs CUDA and the packages bitsandbytes and accelerate"),
}

RUNNING = ("seed", "max-minutes", "device", "dtype", "llm-weights", "shard-llm", "log")
OWN = ("split", "train-tasks", "test-tasks", "columns")  # which tasks are meta-train and meta-test


class Help(argparse.RawDescriptionHelpFormatter):
    """A script's docstring as it stands, and each flag's default after its help."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.nargs != 0 and action.default not in (None, "", [], argparse.SUPPRESS)
        return action.help + (" (default: %(default)s)" if shown and "default" not in action.help else "")


def make_parser(description: str, *flags: str) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring and takes these of the FLAGS, each by its whole name only."""
    parser = argparse.ArgumentParser(description=description, formatter_class=Help, allow_abbrev=False)
    group = parser.add_argument_group("what to run on")
    for name in flags:
        group.add_argument(f"--{name}", **FLAGS[name])
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None,
          presets: dict[str, dict] | None = None) -> argparse.Namespace:
    """Parse flags, fill in the values of a preset (those of PRESETS, and the script's own in `presets`), and
    print which preset it is, why, and how to change it."""
    values = {preset: PRESETS[preset] | (presets or {}).get(preset, {}) for preset in PRESETS}
    for action in parser._actions:  # the help of a preset's flag names both values
        if action.dest in values["paper"]:
            both = [values[preset][action.dest] for preset in ("paper", "pocket")]
            paper, pocket = (" ".join(v) if isinstance(v, list) else str(v) for v in both)
            action.help += f" (paper: {paper}; pocket: {pocket.removeprefix(f'{ASSETS}/')})"
    args, why = parser.parse_args(argv), "as asked"
    if args.preset is None:
        args.preset, why = ("paper", "a CUDA device is there") if torch.cuda.is_available() else \
            ("pocket", "no CUDA device is there")
    values = values[args.preset] | {"template": "space"}
    args.filled_in = [n for n in values if getattr(args, n, "") is None]  # by the preset
    vars(args).update({name: values[name] for name in args.filled_in})
    other = "pocket" if args.preset == "paper" else "paper"
    if is_main():
        made = f", distiller {args.distiller}, l = {args.distill_len}" if "distiller" in args else ""
        print(f"preset {args.preset} ({why}): LLM {Path(args.llm).name}{made}; change it with --preset "
              f"{other} or with any single flag", flush=True)
    if "split" in args and args.split == "non_paraphrase_to_paraphrase":  # its long name
        args.split = "non_para_to_para"
    return args


def check(*rules: tuple[bool, str]) -> None:
    """Raise one UserError that lists every broken rule; a rule is (holds, message)."""
    faults = [message for holds, message in rules if not holds]
    if faults:
        raise UserError("; ".join(faults))


@contextlib.contextmanager
def naming(where: str):
    """A UserError inside says first where it arose."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


@contextlib.contextmanager
def noting_faults():
    """A UserError inside is told as a note, and what it is about left out."""
    try:
        yield
    except UserError as error:
        if is_main():
            print(f"note: left out: {error}")


def require_finite(what: str, values: torch.Tensor) -> None:
    """Raise UserError, naming them, for numbers that mean nothing: argmax takes NaN for the largest."""
    check((bool(values.isfinite().all()), f"{what} is not finite; look at weights and vectors, or use "
           "--dtype fp32"))


def at_least(args: argparse.Namespace, least: int, *names: str) -> list[tuple[bool, str]]:
    """Rules that these flags, where there and given, are `least` or more, for `check`."""
    return [(value >= least, f"--{name.replace('_', '-')} is {value}; give at least {least}")
            for name in names if (value := getattr(args, name, None)) is not None]


def finite(args: argparse.Namespace, *names: str) -> list[tuple[bool, str]]:
    """Rules that these flags, where there and given, are finite and not negative, for `check`."""
    return [(0 <= value < math.inf, f"--{name.replace('_', '-')} is {value}; give a finite number, 0 or more")
            for name in names if (value := getattr(args, name, None)) is not None]


def shared_rules(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Rules on those of the FLAGS that the script has, for `check`."""
    split, known = getattr(args, "split", FUNCTIONS), [*SPLITS, FUNCTIONS]
    eight_bit, cuda = getattr(args, "llm_weights", None) == "8bit", torch.cuda.is_available()
    return [
        (split in known or split.endswith(".json"),
         f"--split {split} is unknown; {did_you_mean(split, known)}"),
        *at_least(args, 1, "distill_len", "k", "max_segments"),
        (getattr(args, "segments", 1) == "auto" or getattr(args, "segments", 1) >= 1,
         "--segments is below 1; give a number or auto"), *at_least(args, 0, "seed"), *device_rules(args),
        (getattr(args, "seed", 0) < 2 ** 32, "--seed is above 2 ** 32 - 1; give less"),
        *finite(args, "max_minutes"),
        ((log := getattr(args, "log", "none")) == "none" or importlib.util.find_spec(log) is not None,
         f"--log {log} needs the package {log}: pip install {log}"),
        (not eight_bit or (args.device != "cpu" and cuda),
         "--llm-weights 8bit needs a CUDA device; use fp32 or bf16 on a CPU"),
        *((not eight_bit or importlib.util.find_spec(package) is not None,
           f"--llm-weights 8bit needs the package {package}: pip install {package}")
          for package in ("bitsandbytes", "accelerate")),
    ]


def place_rule(flag: str, path: str) -> tuple[bool, str]:
    """The rule that a file can be written at `path` ("": none is asked for), for `check`."""
    absolute = Path(path).absolute()
    there = next(p for p in (absolute, *absolute.parents) if os.path.exists(p))
    fault = None if not path else (
        "has too long a name" if max(len(os.fsencode(part)) for part in absolute.parts) > 200 else
        "is a folder" if os.path.isdir(absolute) else
        "stands under a file" if there != absolute and not os.path.isdir(there) else
        "is no plain file" if os.path.lexists(absolute) and not os.path.isfile(absolute) else
        "must not be written to" if not os.access(there, os.W_OK) else
        "stands on a full disk" if 0 < (disk := shutil.disk_usage(there)).total and disk.free < 1 << 16
        else None)
    return fault is None, f"{flag} {path} {fault}; give another name"


def device_rules(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Rules on --device and --dtype, where the script has them, for `check`."""
    device, cuda = getattr(args, "device", "cpu"), torch.cuda.is_available()
    return [
        (re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device) is not None,
         f"--device {device} is unknown; give auto, cpu, mps, cuda or cuda:N"),
        (device != "mps" or torch.backends.mps.is_available(),
         "--device mps, but torch sees no GPU of a Mac (Apple silicon, a recent macOS, torch for arm64); use "
         "--device cpu"),
        (device != "mps" or "WORLD_SIZE" not in os.environ,
         "--device mps is one device, and torchrun shares work among several; start with python"),
        (not device.startswith("cuda") or cuda,
         f"--device {device}, but torch sees no CUDA device; use --device cpu"),
        (getattr(args, "dtype", None) != "fp16" or (device not in ("cpu", "mps") and cuda),
         f"--dtype fp16 on {'a Mac' if device == 'mps' else 'a CPU'}; use fp32 or bf16 there"),
    ]


def did_you_mean(name: str, known) -> str:
    """The nearest known names, for an error message."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"


def is_main() -> bool:
    """True on rank 0, which alone prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def setup(args: argparse.Namespace, training: bool) -> torch.device:
    """Seed, join the ranks that torchrun started, and return this rank's device; fills in args.dtype."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if args.device == "auto" else args.device)
    joins = "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if joins and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # also of cuda:1: memory and time are measured there
    if joins:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if not is_main():
            sys.stdout = io.StringIO()  # rank 0 alone prints
    if device.type == "cuda":
        # plans its kernels anew for each shape, and here every batch has another (a step took twice as long)
        torch.backends.cuda.enable_cudnn_sdp(False)
    if args.dtype == "auto":
        if device.type == "cuda":
            args.dtype = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        elif device.type == "mps":
            args.dtype = "fp32"  # exact first: nobody has compared bf16 there
        else:
            # DEVIATION: the paper trains in fp16; a CPU with bf16 in hardware is up to twice as fast in that.
            in_hardware = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
            args.dtype = "bf16" if training and in_hardware else "fp32"
    torch.manual_seed(getattr(args, "seed", 0))
    return device


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


def gather(records: list) -> list:
    """The records of all ranks, those of rank 0 first."""
    if not dist.is_initialized():
        return records
    parts: list[list] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, records)
    return [record for part in parts for record in part]


def attention_for(rows: list[dict], device: torch.device):
    """A context for training on data.collate's rows: on a CPU, plain attention where they are short, as the
    backward pass of its flash attention in bf16 takes three times as long; the scores of long rows would take
    gigabytes. In bf16 they stay bf16, as by default plain attention would compute them in fp32."""
    longest = max(len(r["demo"]) + sum(len(x) + sum(map(len, ys)) for x, ys in r["queries"]) for r in rows)
    plain = device.type == "cpu" and len(rows) * longest ** 2 <= 2 ** 20
    if plain:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # in spite of its name on CPUs too
    return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()


def trim_heap() -> None:
    """Give freed memory back to the system: on a CPU, batches of ever new shapes would split the heap into
    pieces that glibc keeps (6 GB after 80 steps of the pocket pretraining)."""
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
    gpu = device.type == "cuda"
    return {"peak_gpu_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2)} if gpu else {}


def finish(metrics: dict) -> dict:
    """Print and return the final metrics, as the last line of standard output, one JSON object."""
    if is_main():
        print(json.dumps(metrics), flush=True)
    return metrics
