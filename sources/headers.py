"""Headers of checkpoints and vector files, which anybody may have written: looked at before anything is
built from them."""

import argparse
import hashlib
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from common import STARTS, TEMPLATES, UserError, check, gather, is_main

USABLE = "give a GPT-2, OPT, Llama, Qwen, Mistral, Gemma or T5"
WHOLE, NUMBER, OPTIONAL = "a whole number of 0 or more", "a number", "a number or nothing"
KINDS = {  # what a field must be: a type, WHOLE, NUMBER, or the values it can have
    "state": {"model": dict, "trained_on": dict, "flags": dict, "metrics": dict, "notes": list,
              "scaler": dict, "step": WHOLE, "bad_evaluations": WHOLE, "ranks": WHOLE, "evaluated": NUMBER,
              "best": OPTIONAL, "best_by": str},
    "model": {"llm": dict, "distiller": str, "distill_len": WHOLE, "vector_start": STARTS,
              "template": TEMPLATES},
    "about": {"llm": dict, "template": TEMPLATES, "demonstrations": WHOLE, "tokens": WHOLE, "labels": list,
              "method": ("mend", "hypertuning")},
    "pretrain": {"corpus": str, "objective": ("kl", "clm", "clm+kl"), "beta": NUMBER},
    "finetune": {"tasks": str, "split": str, "lam": NUMBER, "own_tasks": dict},
}
# of a distiller's configuration: what names code, or kernels from elsewhere, and what a distiller never has
REMOTE = re.compile(r"auto_map|.*attn_implementation.*|.*experts_implementation.*|trust_remote_code|"
                    r"quantization_config|custom_.*|use_kernel.*")
NO_ATTENTION = re.compile(r"mamba_|conv|ssm_|linear_conv|block_types|layers_block")  # fields of such layers
LAYERS = re.compile(r"n_layers?|num_(hidden_|decoder_|encoder_)?layers")


def sealed(name: str, header: dict) -> dict[str, str]:
    """A header as safetensors keeps it, with its hash."""
    text = json.dumps(header)
    return {name: text, "hash": hashlib.sha256(text.encode()).hexdigest()}


def read_header(name: str, metadata: dict[str, str] | None) -> dict:
    """What `sealed` made of an object, or an older file without a hash holds; raises ValueError or KeyError
    for anything else, and for NaN and infinity."""
    def refuse(constant: str):
        raise ValueError(f"{constant} in its header")
    text, seal = metadata[name], metadata.get("hash")
    if seal not in (None, hashlib.sha256(text.encode()).hexdigest()):
        raise ValueError("its header was changed")
    header = json.loads(text, parse_constant=refuse)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header


def fits(value, kind) -> bool:
    """Whether a field's value is of a kind of KINDS."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(kind, tuple):
        return isinstance(value, str) and value in kind
    if kind == WHOLE:
        return number and isinstance(value, int) and 0 <= value < 1 << 40
    if kind in (NUMBER, OPTIONAL):
        return number or (kind == OPTIONAL and value is None)
    return isinstance(value, kind)


def check_fields(path: str | Path, what: str, header: dict, *needed: str) -> None:
    """Raise UserError, naming each, where fields of a header lack or are not what KINDS says."""
    missing = [name for name in needed if name not in header]
    wrong = [name for name, kind in KINDS[what].items() if name in header and not fits(header[name], kind)]
    said = [f"{what} lacks {name}" for name in missing]
    said += [f"{name} is {str(header[name])[:60]!r}, expected {kind_name(KINDS[what][name])}"
             for name in wrong]
    check((not said, f"{path} has a header that this project has not written: {', '.join(said)}; take "
           "another file"))


def kind_name(kind) -> str:
    if isinstance(kind, tuple):
        return f"one of {', '.join(kind)}"
    return kind if isinstance(kind, str) else {dict: "an object", list: "a list", str: "a text"}[kind]


def check_state(path: Path, state: dict) -> None:
    """Raise UserError unless those fields of a checkpoint's state that are there can be what they should."""
    check_fields(path, "state", state)
    for name, about in state.get("trained_on", {}).items():
        check((name in ("pretrain", "finetune") and isinstance(about, dict),
               f"{path} has a header that this project has not written: stage {name[:60]!r}; take another"))
        check_fields(path, name, about, *(["split"] * ("tasks" in about)))
    wrong = [name for name, value in state.get("metrics", {}).items() if not fits(value, NUMBER)]
    check((not wrong, f"{path} has metrics that are no numbers: {', '.join(wrong)[:60]}; take another file"))


def check_resumable(path: Path, saved: dict, now: dict, flags: tuple[str, ...]) -> None:
    """Raise UserError unless a checkpoint's state has all that a run goes on with, and is of the same model,
    data, ranks and `flags` as the run's own state now. What an older one lacks, hashes above all, is taken
    for the same."""
    check_fields(path, "state", saved, "model", "trained_on", "flags", "step", "evaluated", "best",
                 "bad_evaluations", "metrics", "scaler")
    check_fields(path, "model", saved["model"], "llm")
    saved["model"]["llm"] = now["model"]["llm"] | saved["model"]["llm"]
    old, new = ({**state["model"], "ranks": state.get("ranks", now["ranks"]),
                 **{f"{stage} {name}": value for stage, about in list(state["trained_on"].items())[-1:]
                    for name, value in about.items()},
                 **{f"--{name.replace('_', '-')}": state["flags"][name] for name in flags
                    if name in state["flags"]}} for state in (saved, now))
    new |= {name: None for name in old.keys() - new.keys()}
    old = {n: v if "hash" in n or v is False or (n, v) == ("--max-segments", 1) else None
           for n, v in new.items()} | old
    differ = [f"{name} {str(old[name])[:60]} (now {str(new[name])[:60]})" for name in old
              if old[name] != new[name]]
    check((not differ, f"--resume: {path} was trained with {', '.join(differ)}; give the flags of that run, "
                       "or another --out-dir"))


def check_same_step(folder: Path, step: int) -> None:
    """Raise UserError, on every rank, unless all ranks go on from one step: machines may share no folder."""
    steps = sorted({*gather([step])})
    check((len(steps) == 1, f"--resume: the ranks found steps {steps} in {folder}; give an --out-dir "
                            "that all machines share, or copy its last.safetensors to each"))


def check_moments(path: Path, name: str, shape: torch.Size, moments: dict[str, Tensor]) -> None:
    """Raise UserError unless an optimiser's moments of a parameter have its shape."""
    wrong = [key for key, t in moments.items() if t.shape != (torch.Size() if key == "step" else shape)]
    check((not wrong, f"{path} has optimiser moments of another shape than {name}; take another file"))


def is_pretraining(path: str | Path, state: dict) -> bool:
    """Whether a checkpoint is of MEND's pretraining alone; raises UserError where such a one lacks what
    others are compared by."""
    stages = state.get("trained_on", {})
    if stages.keys() != {"pretrain"} or stages["pretrain"].get("objective", "kl") != "kl":
        return False
    check_fields(path, "state", state, "model", "metrics")
    check_fields(path, "model", state["model"], "llm", "distiller", "distill_len", "vector_start", "template")
    check(("recovered" in state["metrics"], f"{path} does not say what it recovered; take another file"))
    return True


def method_of(state: dict) -> str:
    """The method that a checkpoint's training makes it, by the checkpoint's state."""
    if state["model"]["distiller"] == "free":
        return "prompt_tuning"
    stages = state.get("trained_on", {})
    # a checkpoint that is older than the flags for it was trained with their defaults
    distils = "pretrain" in stages and stages["pretrain"].get("objective", "kl") != "clm" or \
        "finetune" in stages and stages["finetune"].get("lam", 1) > 0
    return "mend" if distils or not stages else "hypertuning"


def template_for(args: argparse.Namespace, state: dict) -> str:
    """--template, or, where that is not given, the one that a checkpoint was trained with."""
    return state["model"]["template"] if "template" in args.filled_in else args.template


def refuse_wrong_method(methods: list[str], state: dict, path: str) -> None:
    """Raise when a checkpoint was not trained in the way that the method's name says."""
    own = method_of(state)
    holds = {"prompt_tuning": "free vectors (--distiller free)",
             "mend": "a distiller that was trained with L_distill",
             "hypertuning": "a distiller that was trained without L_distill"}[own]
    check((methods in ([], [own]), f"{path} holds {holds}; evaluate it with --methods {own}, or give a "
                                   f"checkpoint of {' '.join(methods)} (docs/reference.md)"))


def check_model(path: str | Path, model: dict, shapes: dict[str, list[int]], vocab: int) -> None:
    """Raise UserError unless a checkpoint's distiller can be built from its header: fields of the right kind,
    a length that is that of its tensors, and a configuration that names no code and no size beyond them.

    shapes: of the file's tensors. vocab: of the LLM, whose embeddings a distiller without its own reads.
    """
    check_fields(path, "model", model, "llm", "distiller", "distill_len", "vector_start", "template")
    fault = f"{path} has a header that does not belong to its tensors: "
    spec, config = model["distiller"], model.get("backbone")
    rows = next((shapes[name][0] + spec.startswith("kv:") for name in ("distiller.placeholders",
                 "distiller.vectors") if shapes.get(name)), 0)
    check((rows == model["distill_len"], f"{fault}distill_len is {model['distill_len']}, and the file has "
           f"{rows} vectors; take another file"))
    if spec.startswith("kv:"):
        rank = next((shape[0] for name, shape in shapes.items() if name.endswith(".A") and shape), 0)
        check((spec == f"kv:{rank}", f"{fault}{spec[:60]} has adapters of rank {rank}; take another file"))
    elif spec != "free":
        check((isinstance(config, dict), f"{fault}{spec[:60]} without a configuration; take another file"))
        check_config(path, config, shapes, vocab)


def check_config(path: str | Path, config: dict, shapes: dict[str, list[int]], vocab: int) -> None:
    """Raise UserError unless a distiller's configuration is plain and of the size of its tensors."""
    named = [name for name, value in config.items() if value not in (None, "eager", "sdpa")
             and REMOTE.fullmatch(name)]
    check((not named, f"{path} has a header that would load code or kernels: {', '.join(named)[:60]}; take "
           "another file"))
    embedding = shapes.get("distiller.embed.weight")
    vocab = embedding[0] if embedding else vocab
    own = {name: value for name, value in config.items() if fits(value, NUMBER)}
    large = [f"{name} {str(value)[:20]}" for name, value in own.items()
             if abs(value) > 10 ** 8 or LAYERS.fullmatch(name) and not 1 <= value <= len(shapes)]
    large += [f"vocab_size {config.get('vocab_size')}"] * (config.get("vocab_size") != vocab)
    check((not large, f"{path} has a header that does not belong to its tensors: {', '.join(large)}; take "
           "another file"))


def check_llm_config(flag: str, config) -> None:
    """Raise UserError for a model's configuration of an absurd size, or that asks for foreign kernels."""
    layers = getattr(config, "num_hidden_layers", None)
    kernels = getattr(config, "_attn_implementation_internal", None)
    check((isinstance(layers, int) and 1 <= layers <= 1000,
           f"{flag} has a configuration of {str(layers)[:40]} layers; give a whole number up to 1,000"),
          (kernels is None or isinstance(kernels, str) and kernels in ("eager", "sdpa"),
           f"{flag} has a configuration with attn_implementation {str(kernels)[:60]}; take that out"))


def check_attention(flag: str, config) -> None:
    """Raise UserError for a model whose configuration says that something other than attention by positions
    and our own mask joins its tokens: packed queries would reach each other, or padding would count."""
    which = f"{flag}, of type {config.model_type},"
    fields = ("attention_types", "attention_chunk_size", "window_size")
    local = [name for name in fields if getattr(config, name, None)]
    biases = any(getattr(c, "alibi", False) for c in (config, getattr(config, "attn_config", None)))
    layers = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    layers |= {name for name in vars(config) if NO_ATTENTION.match(name)}
    check((not local, f"{which} has local attention of its own ({', '.join(local)}), which packed queries "
           f"break; {USABLE}"),
          (not biases, f"{which} has biases in place of positions (ALiBi), which padding and packed queries "
           f"break; {USABLE}"),
          (not layers, f"{which} has layers that are no attention ({', '.join(sorted(layers))[:80]}), which "
           f"packed queries break; {USABLE}"))


def read_vectors_header(path: str | Path, metadata: dict[str, str] | None) -> dict:
    """What a file of vectors says of them."""
    try:
        about = read_header("about", metadata)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"--vectors {path} is no file that --out has written ({error})") from error
    check_fields(path, "about", about, "llm", "template")
    about = {"demonstrations": 0, "tokens": 0, "labels": []} | about
    check((all(isinstance(label, str) and label for label in about["labels"]),
           f"--vectors {path}: its labels must be a list of texts"))
    return about


def check_tensors(what: str | Path, tensors: dict[str, Tensor]) -> None:
    """Raise UserError, naming it, for a tensor that is not of finite floating-point numbers."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    wrong = [name for name, t in tensors.items() if t.dtype not in kinds or not t.isfinite().all()]
    check((not wrong, f"{what} holds numbers that are not finite, in {', '.join(wrong)[:200]}; take another "
                      "one, or, where fp16 cannot hold its weights, --dtype fp32"))


def check_same_shapes(path: str | Path, own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Raise UserError unless a module's tensors and those of a file have the same names and shapes."""
    shapes, found = ({name: t.shape for name, t in tensors.items()} for tensors in (own, saved))
    differ = [name for name in shapes | found if shapes.get(name) != found.get(name)]
    check((not differ, f"{path} has other tensors than its header says, such as {', '.join(differ[:3])[:200]}"
                       "; take another file"))


def same_llm(saved: dict, found: dict) -> bool:
    """Whether an identity that was saved, perhaps before it held hashes, is that of an LLM."""
    return "name" in saved and all(found.get(name) == value for name, value in saved.items())


def require_same_llm(what: str, of: str, saved: dict, found: dict) -> None:
    """Raise UserError where `what`, which is `of` an LLM, is of another; say where that cannot be told."""
    check((same_llm(saved, found), f"{what} {of} the LLM {saved}, and this is {found}; vectors speak to one "
           "LLM only: give its own --llm, or another checkpoint"))
    if "weights_hash" in found.keys() - saved.keys() and is_main():
        print(f"note: {what} names its LLM without hashes: that this is the same one, name and sizes say")
