"""From names and checkpoints to modules, and every refusal of a model that would be silently wrong."""

import argparse
import copy
import hashlib
import json
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

import common
from common import UserError, check, is_main, torch_dtype
from data import Formatter, collate
from model import ENCODER_DECODERS, Distiller, answer_mask, demo_prefix, head_logits, query_states
from sources import headers
from sources.hub import require_model
from sources.pairs import own_layers
from sources.shard import shard_llm
from sources.tasks import Tasks
from sources.text import Tokenizer, check_same_tokens, first_line, model_hashes
from variants import FreeVectors, KeyValueDistiller


def first_layers(llm: PreTrainedModel, n_layers: int) -> PreTrainedModel:
    """A trainable fp32 copy of the LLM's own first `n_layers` layers (of its encoder's where it has one) and
    final norm, as a distiller's backbone.

    DEVIATION: the paper takes the family's smallest sibling (gpt2 for gpt2-large); this is for LLMs without.
    """
    config = copy.deepcopy(llm.base_model.config)
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n_layers]
    backbone = backbone_class(config).from_config(config, dtype=torch.float32,
                                                  attn_implementation=config._attn_implementation)
    missing, _ = backbone.load_state_dict(llm.base_model.state_dict(), strict=False)
    assert not missing, f"first_layers left weights at random: {missing}"
    return backbone


def backbone_class(config) -> type:
    """The class of a distiller's backbone; of T5 the encoder. DEVIATION: the paper drops no decoder."""
    is_t5 = config.model_type in ENCODER_DECODERS
    return transformers.AutoModelForTextEncoding if is_t5 else transformers.AutoModel


def embedding_rms(embed: nn.Module, vocab: int) -> float:
    """Root mean square of a token embedding's entries, over about 4,096 evenly spaced ids."""
    ids = torch.arange(0, vocab, max(1, vocab // 4096), device=next(embed.parameters()).device)
    with torch.no_grad():
        return embed(ids).float().pow(2).mean().sqrt().item()


def load_llm(name: str, device: torch.device, dtype: torch.dtype, weights: str | None = None,
             grad_checkpoint: bool = False) -> PreTrainedModel:
    """The frozen LLM of a hub name or a folder: eval mode, no gradients for its weights.

    Args:
        dtype: of weights and activations. weights: fp32 or bf16 in its place, or 8bit (bitsandbytes, CUDA).
        grad_checkpoint: keep only each layer's input for the backward pass, and run the layer again there.
    """
    require_model("--llm", name)
    dtype = torch_dtype(weights) if weights in ("fp32", "bf16") else dtype
    eight_bit = transformers.BitsAndBytesConfig(load_in_8bit=True) if weights == "8bit" else None
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        headers.check_llm_config(f"--llm {name}", config)
        headers.check_attention(f"--llm {name}", config)
        t5 = config.is_encoder_decoder
        kind = transformers.AutoModelForSeq2SeqLM if t5 else transformers.AutoModelForCausalLM
        llm, report = kind.from_pretrained(
            name, dtype=dtype, output_loading_info=True, quantization_config=eight_bit,
            device_map={"": device} if eight_bit else None, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # a hostile configuration can break any of the libraries below
        raise UserError(f"--llm {name} cannot be loaded as a language model ({first_line(error)}); "
                        "give one such as gpt2-large; where its files are cut short, fetch it again (pocket "
                        "preset: delete the folder, run `make assets`)") from error
    llm = llm if eight_bit else llm.to(device)  # 8-bit weights are there already
    llm, missing = fuse_gelu(llm.eval().requires_grad_(False)), report["missing_keys"]
    check((not missing, f"--llm {name} lacks weights of its own configuration, such as "
                        f"{min(missing, default='')}; give a whole model"),
          (not t5 or config.model_type in ENCODER_DECODERS,
           f"--llm {name} is an encoder-decoder of type {config.model_type}; of these T5 and mT5 are read"),
          (not t5 or dtype != torch.float16,
           f"--llm {name} in fp16: T5's activations overflow there; give --dtype fp32 or bf16"))
    check_llm(llm, name)
    if grad_checkpoint:
        checkpoint_layers(llm)
    return llm


CHECKED = [  # rows of data.collate: padding, packed queries and options, as everything is read here
    {"demo": [0, 1, 2, 3], "queries": [([4, 5], [[6], [7, 8]]), ([9], [[10]])]},
    {"demo": [11], "queries": [([12, 13], [[14, 15]])]}]  # ids from the middle of the vocabulary


@torch.no_grad()
def check_llm(llm: PreTrainedModel, name: str) -> None:
    """Raise UserError unless prefix, packed queries and head, as model.py reads them, give the logits that
    the LLM itself gives for one unpadded sequence at a time.

    Some architectures have other positions, masks or a scaled head, and would be silently wrong.
    """
    which = f"--llm {name}, of type {llm.config.model_type},"
    middle = llm.get_input_embeddings().weight.shape[0] // 2 - 8  # untrained ids, at the ends, sway in bf16
    headers.check_tensors(f"--llm {name}", {n: t for n, t in llm.named_parameters() if t.is_floating_point()})

    def own_logits(demo: list[int], x: list[int], y: list[int]) -> Tensor:
        """(T_y, V)"""
        demo, x, y = (torch.tensor(ids, device=llm.device) + middle for ids in (demo, x, y))
        if llm.config.is_encoder_decoder:
            start = torch.cat([y.new_tensor([llm.config.decoder_start_token_id]), y[:-1]])
            return llm(input_ids=torch.cat([demo, x])[None], decoder_input_ids=start[None]).logits[0]
        return llm(input_ids=torch.cat([demo, x, y])[None]).logits[0, -len(y) - 1:-1]

    try:
        batch = collate(CHECKED, llm.device)
        batch |= {key: batch[key] + middle for key in ("demo_ids", "query_ids")}
        states = query_states(llm, demo_prefix(llm, batch["demo_ids"], batch["demo_mask"]), batch)
        found = head_logits(llm, states[answer_mask(batch)])                                     # (N, V)
        expected = torch.cat([own_logits(row["demo"], x, y)
                              for row in CHECKED for x, ys in row["queries"] for y in ys])
        difference = ((found - expected).norm() / expected.norm()).item()
    except Exception as error:  # of foreign code: each architecture has errors of its own
        raise UserError(f"{which} cannot read vectors in place of tokens ({first_line(error)}); "
                        f"{headers.USABLE}") from error
    rounding = 1e-3 if llm.dtype == torch.float32 else 0.1  # far above what it does
    check((difference < float("inf"), f"{which} predicts numbers that are not finite; give --dtype fp32"),
          (not difference > rounding, f"{which} gives other predictions for embeddings than for tokens (by "
           f"{difference:.0%}); {headers.USABLE}"))


def load_llm_of(args: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """load_llm of a script's flags; in memory, where --shard-llm takes it to the devices layer by layer."""
    place = torch.device("cpu") if getattr(args, "shard_llm", False) else device
    return load_llm(args.llm, place, torch_dtype(args.dtype), getattr(args, "llm_weights", None),
                    getattr(args, "grad_checkpoint", False))


def checkpoint_layers(llm: PreTrainedModel) -> None:
    """Gradient checkpointing of each layer; transformers' own acts in train mode only, with dropout."""
    llm.checkpoints_layers = True
    for layer in llm.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def fuse_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """Replace GPT-2's GELU, written as eight operations that each keep their result for the backward pass, by
    the one operation of torch that computes the same; returns the model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


def identity(llm: PreTrainedModel) -> dict:
    """What a distiller's checkpoint must agree on with the LLM it is used with: name, sizes, and the hashes
    of weights and tokenizer where it was loaded from files."""
    config = llm.config
    return {"name": Path(config._name_or_path).name, "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size, "layers": config.num_hidden_layers,
            **model_hashes(config._name_or_path)}


def max_positions(config) -> int | None:
    """The longest input of a model in tokens; None where it has no absolute limit."""
    return getattr(config, "max_position_embeddings", None)


def build_distiller(spec: str, llm: PreTrainedModel, distill_len: int, start: str, seed: int,
                    backbone_config: dict | None = None) -> Distiller | KeyValueDistiller | FreeVectors:
    """A distiller for `llm`, on its device.

    Args:
        spec: layers:N for the LLM's own first layers, or the hub name or folder of a sibling with the same
            tokenizer; kv:R for the whole LLM with adapters of rank R, read out as keys and values; free for
            l free vectors (PromptTuning).
        start: what the vectors start from, plain, matched or residual (--vector-start).
        backbone_config: of a checkpoint: build the architecture from it and leave the weights to be loaded.
    """
    check((distill_len <= (longest := max_positions(llm.config) or 1 << 14),
           f"--distill-len is {distill_len}, and this LLM reads {longest} tokens at most; give less"))
    llm_embed, own = llm.get_input_embeddings(), not spec.startswith("layers:")
    if spec == "free":
        return FreeVectors(llm_embed, llm.config.vocab_size, distill_len, seed).to(llm.device)
    if spec.startswith("kv:"):
        rank = int(spec[3:]) if spec[3:].isascii() and spec[3:].isdecimal() else 0
        check((1 <= rank <= llm_embed.embedding_dim, f"--distiller {spec}: expected kv:R with R, the "
               f"adapters' rank, from 1 to the LLM's width {llm_embed.embedding_dim}, as in kv:32"),
              (distill_len >= 2, f"--distill-len {distill_len}: kv:R takes D's first too; give 2 or more"),
              (not llm.config.is_encoder_decoder, f"--distiller {spec} hands over what a decoder-only LLM "
               "keeps of its prefix, and this one is an encoder-decoder; give layers:N or a sibling"),
              (not getattr(llm, "is_loaded_in_8bit", False), f"--distiller {spec} adapts the LLM's weights, "
               "which are in 8 bit; give --llm-weights bf16"),
              (not getattr(llm, "checkpoints_layers", False), f"--distiller {spec} needs the LLM's cache, "
               "which --grad-checkpoint does without; leave that out"))
        return KeyValueDistiller(llm, distill_len, rank, seed).to(llm.device)
    if backbone_config is not None:
        config = AutoConfig.for_model(**backbone_config)
        backbone = backbone_class(config).from_config(config, dtype=torch.float32)
    elif own:
        require_model("--distiller", spec)
        try:
            config = AutoConfig.from_pretrained(spec, trust_remote_code=False)
            headers.check_llm_config(f"--distiller {spec}", config)
            headers.check_attention(f"--distiller {spec}", config)
            backbone = backbone_class(config).from_pretrained(spec, dtype=torch.float32,
                                                              trust_remote_code=False)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"--distiller {spec} cannot be loaded ({first_line(error)}); give "
                            "layers:N, or a small model of the LLM's family") from error
        check_same_tokens(spec, llm.config._name_or_path)
    else:
        check((not getattr(llm, "is_loaded_in_8bit", False), f"--distiller {spec} would copy the LLM's "
               "weights, which are in 8 bit; give a sibling of the LLM, or --llm-weights bf16"))
        n = own_layers(spec, llm.config.num_hidden_layers)
        try:
            backbone = first_layers(llm, n)
        except Exception as error:  # an architecture whose layers do not stand by themselves
            raise UserError(f"--distiller {spec}: an LLM of type {llm.config.model_type} cannot lend layers "
                            f"({first_line(error)}); give a smaller model of its family") from error
    share = {"plain": None, "matched": 1.0, "residual": 0.1}[start]  # of the LLM's embeddings' scale
    embed = backbone.get_input_embeddings() if own else llm_embed
    return Distiller(fuse_gelu(backbone).to(llm.device), embed, distill_len, llm_embed.embedding_dim, own,
                     seed=seed, output_rms=share and share * embedding_rms(llm_embed, llm.config.vocab_size),
                     residual_embed=llm_embed if start == "residual" else None).to(llm.device)


def distiller_config(distiller: nn.Module, llm: PreTrainedModel, args: argparse.Namespace) -> dict:
    """What `load_distiller` needs to build the distiller again, for a checkpoint's state. args: the flags."""
    config = distiller.backbone and distiller.backbone.config
    return {"llm": identity(llm), "distiller": args.distiller, "distill_len": args.distill_len,
            "vector_start": args.vector_start, "template": args.template, "elastic": args.elastic,
            "backbone": config and config.to_diff_dict() | {"model_type": config.model_type}}


def load_checkpoint(path: str | Path, weights: bool = True) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state) of a checkpoint file, or of the best (else last) one in a run's folder; without
    `weights` the state only."""
    from safetensors import safe_open
    path = checkpoint_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys() if weights else ()
            tensors = {name: file.get_tensor(name) for name in names}
            state = headers.read_header("state", file.metadata())
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a whole checkpoint of this project ({error}); take another one, or "
                        "train again") from error
    if "figures" in state:
        state["metrics"] = state.pop("figures")  # as checkpoints called them once
    headers.check_state(path, state)
    headers.check_tensors(path, tensors)
    return tensors, state


def load_weights(distiller: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Give a distiller the weights of a checkpoint's tensors, which must be all its own."""
    weights = {n.removeprefix("distiller."): t for n, t in tensors.items() if n.startswith("distiller.")}
    headers.check_same_shapes(path, distiller.state_dict(), weights)
    distiller.load_state_dict(weights)


def checkpoint_id(path: str | Path) -> str:
    """A checkpoint's name in results: its run folder and the first digits of its content hash."""
    file = checkpoint_file(path)
    return f"{file.resolve().parent.name}/{file.stem}@{hashlib.sha256(file.read_bytes()).hexdigest()[:10]}"


def checkpoint_file(path: str | Path) -> Path:
    """A checkpoint file itself, or best.safetensors, else last.safetensors, of a run's folder, or
    model.safetensors of a published one (serving/pretrained.py)."""
    path = Path(path)
    for file in (path, *(path / f"{name}.safetensors" for name in ("best", "last", "model"))):
        if file.is_file():
            return file
    raise UserError(f"no checkpoint at {path}: expected a .safetensors file, or a folder with "
                    "best.safetensors or last.safetensors in it, as the training scripts write them, or "
                    "model.safetensors of distill.py --publish")


def load_distiller(path: str | Path, llm: PreTrainedModel) -> tuple[nn.Module, dict]:
    """The distiller of a checkpoint file or folder, for this LLM, and the checkpoint's state."""
    tensors, state = load_checkpoint(path)
    return restored(path, tensors, state, llm), state


def restored(path: str | Path, tensors: dict[str, Tensor], state: dict, llm: PreTrainedModel) -> nn.Module:
    """The distiller that `load_checkpoint` read, for this LLM. path: for messages."""
    config, found = state.get("model", {}), identity(llm)
    check(("vector_start" in config, f"{path} is older than --vector-start; train it again"))
    headers.check_fields(path, "model", config, "llm")
    headers.require_same_llm(f"the checkpoint {path}", "was trained for", config["llm"], found)
    headers.check_model(path, config, {n: list(t.shape) for n, t in tensors.items()}, llm.config.vocab_size)
    try:
        if not config["distiller"].startswith(("kv:", "free")):
            check_backbone(path, config["backbone"], tensors)
        distiller = build_distiller(config["distiller"], llm, config["distill_len"], config["vector_start"],
                                    0, config.get("backbone"))
        load_weights(distiller, tensors, path)
    except UserError:
        raise
    except Exception as error:  # a header can break any of the libraries below
        raise UserError(f"{path} has a header that no distiller can be built from ({first_line(error)}); "
                        "take another file") from error
    return distiller


def check_backbone(path: str | Path, backbone_config: dict, tensors: dict[str, Tensor]) -> None:
    """Raise UserError unless the backbone of a checkpoint's configuration, built without memory, has the
    shapes of its tensors."""
    config = AutoConfig.for_model(**backbone_config)
    with torch.device("meta"):
        backbone = backbone_class(config).from_config(config, trust_remote_code=False)
    backbone.set_input_embeddings(nn.Identity())
    prefix = "distiller.backbone."
    headers.check_same_shapes(path, backbone.state_dict(),
                              {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})


def set_length(distiller: nn.Module, state: dict, length: int, path: str) -> None:
    """Let the distiller of an elastic checkpoint make `length` vectors; raise UserError where it cannot."""
    own, least = distiller.distill_len, 2 if isinstance(distiller, KeyValueDistiller) else 1
    check((length >= least, f"--distill-len is {length}, and {path} makes {least} or more; give more"),
          (length == own or state["model"].get("elastic", False), f"--distill-len is {length}; {path} was "
           f"trained for {own} vectors; leave the flag out, or train with --elastic"),
          (length <= own, f"--distill-len is {length}, and {path} has {own} placeholders; give less"))
    distiller.distill_len = length
    if length < min(own, 8) and is_main():
        print(f"note: l = {length} was never trained, as --elastic draws 8, 16, ... and {own}")


def require_input_vectors(distiller: nn.Module, what: str) -> None:
    """Raise UserError, naming `what` needs them, where a distiller hands over keys and values instead."""
    check((not isinstance(distiller, KeyValueDistiller), f"{what} looks at vectors at the LLM's input, and "
           "kv:R has keys and values; give another --distiller or --checkpoint"))


def make_formatter(args: argparse.Namespace, tokenizer: Tokenizer, llm, distiller) -> Formatter:
    """The formatter of examples with the length limits of this LLM and distiller (None: without vectors)."""
    backbone = distiller is not None and distiller.backbone
    made = Formatter(tokenizer, args.template, args.context_len, args.distill_len, max_positions(llm.config),
                     max_positions(backbone.config) if backbone else None,
                     getattr(args, "segments", 1), getattr(args, "max_segments", 1))
    head, kv = len(made.turns.head), isinstance(distiller, KeyValueDistiller)
    check((not kv or args.template != "chat" or head > 1, f"--template chat: that of {tokenizer.name} starts "
           f"with {head} tokens, and kv:R needs 2; give layers:N or a sibling"))
    return made


def prepare(args: argparse.Namespace, llm, distiller, device: torch.device) -> Formatter:
    """The last step before an LLM and its distiller are used: share them out over the ranks where --shard-llm
    asks for it, and make the formatter of their examples."""
    if getattr(args, "shard_llm", False):
        shard_llm(llm, distiller, device)
    return make_formatter(args, Tokenizer(args.llm), llm, distiller)


def load_all(args: argparse.Namespace, device: torch.device) -> tuple:
    """The LLM of --llm, the distiller of --checkpoint in eval mode, the latter's state, and the formatter.

    Without a checkpoint there is no distiller (None, {}); else its l and template fill in what is not given.
    """
    llm, distiller, state = load_llm_of(args, device), None, {}
    if args.checkpoint:
        distiller, state = load_distiller(args.checkpoint, llm)
        distiller.eval()
        if "distill_len" in args and "distill_len" not in args.filled_in:
            set_length(distiller, state, args.distill_len, args.checkpoint)
        args.distill_len = distiller.distill_len
        args.template = headers.template_for(args, state)
    return llm, distiller, state, prepare(args, llm, distiller, device)


def refuse_seen_tasks(trained_on: dict, tasks: Tasks, only: list[str] | None = None) -> None:
    """Raise when the checkpoint was finetuned on a task to evaluate: meta-test tasks must be unseen."""
    stage = trained_on.get("finetune", {})
    seen = {*tasks.seen(stage.get("own_tasks", {}))} & {*(only or tasks.test)}
    check((not seen, f"the checkpoint was finetuned on the examples of {', '.join(sorted(seen))}; evaluate "
                     "it on others, with --test-tasks or --only"))
    collections = json.loads((common.ROOT / "splits.json").read_text())
    for name in {*stage.get("tasks", "").split()} & {*tasks.collection.split()} & collections.keys():
        table = collections[name]["settings"].get(stage["split"], {"train": [], "test": []})
        seen = sorted((set(table["train"]) - set(table["test"])) & set(only or tasks.test))
        check((not seen, f"the checkpoint was finetuned on {stage['split']}, whose training tasks include "
                         f"{', '.join(seen)}; evaluate it on that --split, or on other tasks with --only"))
