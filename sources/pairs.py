"""Which distiller goes with an LLM: settled by configurations and tokenizers, before anything is read."""

import argparse
import re
from pathlib import Path

from transformers import AutoConfig

from common import check, is_main
from sources.hub import require_model
from sources.template import make_turns
from sources.text import Tokenizer, check_same_tokens

SIBLINGS = {  # LLMs by name -> the smallest model with their tokenizer, as the paper pairs them (Sec. 4.1)
    r"gpt2(-medium|-large|-xl)?": "gpt2", r"opt-.*": "facebook/opt-125m",
    r"t5-.*-lm-adapt": "google/t5-small-lm-adapt", r"flan-t5-.*": "google/flan-t5-base"}


def settle_distiller(args: argparse.Namespace) -> None:
    """Refuse a distiller, or a template, that cannot be the LLM's. Where a preset filled one in, change
    args.distiller to what belongs to the LLM, and say so: for paper its smallest sibling, else a third of its
    own layers; for pocket the latter where it has fewer than layers:6 takes.
    """
    require_model("--llm", args.llm)
    try:
        layers = int(AutoConfig.from_pretrained(args.llm, trust_remote_code=False).num_hidden_layers)
    except Exception:  # load_llm says what is wrong with it
        return
    name = Path(args.llm).name
    if "distiller" in args.filled_in and args.distiller.startswith("layers:") and \
            int(args.distiller[7:]) > layers:
        args.distiller = third_of(layers)
        if is_main():
            print(f"{name} has {layers} layers: distiller {args.distiller}; change it with --distiller")
    if "distiller" in args.filled_in and not args.distiller.startswith("layers:"):
        args.distiller = usual_distiller(name, layers)
        if args.distiller.startswith("layers:") and is_main():
            print(f"no smaller model with the tokenizer of {name} is known here: distiller {args.distiller}, "
                  f"of the LLM's own {layers} layers; change it with --distiller")
    if args.distiller.startswith("layers:"):
        own_layers(args.distiller, layers)
    elif args.distiller != "free" and not args.distiller.startswith("kv:"):
        require_model("--distiller", args.distiller)
        check_same_tokens(args.distiller, args.llm)
    if args.template != "space":
        make_turns(args.template, Tokenizer(args.llm))


def usual_distiller(name: str, layers: int) -> str:
    """The smallest sibling of an LLM of this name and so many layers, or a third of its own layers."""
    known = [sibling for pattern, sibling in SIBLINGS.items() if re.fullmatch(pattern, name)]
    return [*known, third_of(layers)][0]


def third_of(layers: int) -> str:
    """layers:N for about a third of an LLM's own layers."""
    return f"layers:{max(1, round(layers / 3))}"


def own_layers(spec: str, total: int) -> int:
    """N of layers:N. Raises UserError unless an LLM of `total` layers has as many."""
    n = int(spec[7:]) if spec[7:].isascii() and spec[7:].isdecimal() else 0
    check((1 <= n <= total, f"--distiller {spec}: expected layers:N with a whole number N, as in layers:6; "
                            f"this LLM has {total} layers: give layers:1 to layers:{total}"))
    return n
