"""From names and checkpoints to modules, and every refusal of a model that would be silently wrong.
"""

import argparse
import copy
import json
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

import common
from common import UserError, check, require_hub, torch_dtype
from data import Encoder
from model import ENCODER_DECODERS, Distiller, FreeVectors, demo_prefix, head_logits, query_states
from run import load_checkpoint
from sources import Tasks, Tokenizer


def first_layers(llm: PreTrainedModel, n_layers: int) -> PreTrainedModel:
    """A trainable fp32 copy of the LLM's own first `n_layers` layers and final norm, as a distiller's backbone; of its
    encoder's layers where it has one.

    DEVIATION: the paper takes the family's smallest sibling (gpt2 for gpt2-large); this is for an LLM without one.
    """
    config = copy.deepcopy(llm.base_model.config)
    total = config.num_hidden_layers
    if not 1 <= n_layers <= total:
        raise UserError(f"--distiller layers:{n_layers}, but this LLM has {total} layers: give layers:1 to layers:{total}")
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n_layers]
    backbone = backbone_class(config).from_config(config, dtype=torch.float32,
                                                  attn_implementation=config._attn_implementation)
    missing, _ = backbone.load_state_dict(llm.base_model.state_dict(), strict=False)
    assert not missing, f"first_layers left weights at random: {missing}"
    return backbone


def backbone_class(config):
    """The transformers class of a distiller's backbone."""
    return AutoModelForTextEncoding if config.model_type in ENCODER_DECODERS else AutoModel


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
    if not Path(name).exists() and not is_cached(name):
        if Path(name).is_absolute() or name.startswith("."):
            raise UserError(f"--llm {name} does not exist; run `make assets`, or give a hub name or a model's folder")
        require_hub(f"--llm {name}")
    dtype = torch_dtype(weights) if weights in ("fp32", "bf16") else dtype
    eight_bit = weights == "8bit"
    placement = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}} if eight_bit else {}
    try:
        config = AutoConfig.from_pretrained(name)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        llm, report = kind.from_pretrained(name, dtype=dtype, output_loading_info=True, **placement)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--llm {name} cannot be loaded as a language model ({str(error).splitlines()[0]}); "
                        "give one such as gpt2-large, t5-large-lm-adapt or a Llama; where its files are cut short, fetch it "
                        "again (`make assets` for the pocket preset, after deleting the folder)") from error
    llm = fuse_gelu((llm if eight_bit else llm.to(device)).eval().requires_grad_(False))  # 8-bit weights are there already
    check((not report["missing_keys"], (f"--llm {name} lacks weights of its own configuration, such as "
                                         f"{min(report['missing_keys'], default='')}; give a whole model")),
          (not config.is_encoder_decoder or config.model_type in ENCODER_DECODERS,
           f"--llm {name} is an encoder-decoder of type {config.model_type}; of these T5, flan-T5 and mT5 can be used"),
          (not config.is_encoder_decoder or dtype != torch.float16,
           f"--llm {name} in fp16: T5's activations overflow there; give --dtype fp32 or bf16"))
    check_llm(llm, name)
    if grad_checkpoint:
        checkpoint_layers(llm)
    return llm


@torch.no_grad()
def check_llm(llm: PreTrainedModel, name: str) -> None:
    """Raise UserError unless prefix, query and head, as this file reads them, give the LLM's own logits.

    Some architectures have other positions, masks or a scaled head, and would be silently wrong.
    """
    for field in ("attention_types", "attention_chunk_size", "window_size"):  # local attention that window_masks does not know
        if getattr(llm.config, field, None):
            raise UserError(f"--llm {name}, of type {llm.config.model_type}, has local attention of its own kind ({field}), which "
                            "packed queries would break; give a GPT-2, OPT, Llama, Qwen, Mistral, Gemma or T5")
    ids = torch.arange(3, 9, device=llm.device)[None]                                                # (1, 6)
    prefix_ids, query_ids = ids[:, :3], ids[:, 3:]
    index, ones = torch.arange(3, device=llm.device)[None], torch.ones_like(query_ids)
    batch = {"query_ids": query_ids, "query_mask": ones.bool(), "segment": ones * 0, "branch": ones, "position": index,
             "predictor": index}
    try:
        found = head_logits(llm, query_states(llm, demo_prefix(llm, prefix_ids, ones.bool()), batch)[0])
        if llm.config.is_encoder_decoder:
            start = torch.full_like(ids[:, :1], llm.config.decoder_start_token_id)
            expected = llm(input_ids=prefix_ids, decoder_input_ids=torch.cat([start, query_ids[:, :-1]], 1)).logits[0]
        else:
            expected = llm(input_ids=ids).logits[0, 2:-1]
        difference = ((found - expected).norm() / expected.norm()).item()
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--llm {name}, of type {llm.config.model_type}, cannot read vectors in place of tokens "
                        f"({type(error).__name__}: {error}); give a GPT-2, OPT, Llama, Qwen, Mistral, Gemma or T5") from error
    if difference > 0.1:  # far above what rounding does
        raise UserError(f"--llm {name}, of type {llm.config.model_type}, gives other predictions for embeddings behind a "
                        f"prefix than for tokens (by {difference:.0%}); give a GPT-2, OPT, Llama, Qwen, Mistral, Gemma or T5")


def checkpoint_layers(llm: PreTrainedModel) -> None:
    """Gradient checkpointing of each layer. transformers' own acts in train mode only, where dropout is on."""
    llm.checkpoints_layers = True
    for layer in llm.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def fuse_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """Replace GPT-2's GELU, written as eight operations that each keep their result for the backward pass, by the one
    operation of torch that computes the same; returns the model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


def is_cached(name: str) -> bool:
    """Whether a hub model's configuration is in the local hub cache already."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def identity(llm: PreTrainedModel) -> dict:
    """What a distiller's checkpoint must agree on with the LLM it is used with."""
    config = llm.config
    return {"name": Path(config._name_or_path).name, "hidden_size": config.hidden_size, "vocab_size": config.vocab_size,
            "layers": config.num_hidden_layers}


def max_positions(config) -> int | None:
    """The longest input of a model in tokens; None where it has no absolute limit."""
    return getattr(config, "max_position_embeddings", None)


def build_distiller(spec: str, llm: PreTrainedModel, distill_len: int, start: str, seed: int,
                    backbone_config: dict | None = None) -> "Distiller | FreeVectors":
    """A distiller for `llm`, on its device.

    Args:
        spec: layers:N for the LLM's own first layers, or the hub name or folder of a sibling with the same tokenizer;
            free for l free vectors (PromptTuning).
        backbone_config: of a checkpoint: build the architecture from it and leave the weights to be loaded.
    """
    embed, own = llm.get_input_embeddings(), not spec.startswith("layers:")
    if spec == "free":
        return FreeVectors(embed, llm.config.vocab_size, distill_len, seed).to(llm.device)
    if backbone_config is not None:
        config = AutoConfig.for_model(**backbone_config)
        backbone = backbone_class(config).from_config(config, dtype=torch.float32)
    elif own:
        if not Path(spec).exists() and not is_cached(spec):
            require_hub(f"--distiller {spec}")
        try:
            backbone = backbone_class(AutoConfig.from_pretrained(spec)).from_pretrained(spec, dtype=torch.float32)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"--distiller {spec} cannot be loaded ({str(error).splitlines()[0]}); give layers:N, or a "
                            "small model of the LLM's family") from error
        check_same_tokens(spec, llm.config._name_or_path)
    else:
        if not spec[7:].isdecimal():
            raise UserError(f"--distiller {spec}: expected layers:N with a whole number N, as in layers:6")
        if getattr(llm, "is_loaded_in_8bit", False):
            raise UserError(f"--distiller {spec} would copy the LLM's weights, which are in 8 bit; give a sibling of the LLM, "
                            "or --llm-weights bf16")
        backbone = first_layers(llm, int(spec[7:]))
    shares = {"plain": None, "matched": 1.0, "residual": 0.1}  # of the LLM's embeddings' scale
    rms = shares[start] and shares[start] * embedding_rms(embed, llm.config.vocab_size)
    return Distiller(fuse_gelu(backbone).to(llm.device), backbone.get_input_embeddings() if own else embed, distill_len,
                     llm.get_input_embeddings().embedding_dim, own_embedding=own, output_rms=rms,
                     residual_embed=llm.get_input_embeddings() if start == "residual" else None,
                     seed=seed).to(llm.device)


def check_same_tokens(distiller: str, llm: str) -> None:
    """Raise UserError, naming the tokens, unless each token that text becomes has the same id in both vocabularies."""
    def tokens(name, flag):
        try:
            return AutoTokenizer.from_pretrained(name).backend_tokenizer.get_vocab(with_added_tokens=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{flag} {name} has no tokenizer beside it ({str(error).splitlines()[0]}); both models' are "
                            "compared: give whole models, or --distiller layers:N") from error
    own, other = tokens(llm, "--llm"), tokens(distiller, "--distiller")
    differ = sorted((t for t in own.keys() | other.keys() if own.get(t) != other.get(t)),
                    key=lambda t: (own.get(t, other.get(t)), t))
    if differ:
        named = ", ".join(f"{t!r} ({own.get(t, 'not there')} in the LLM's, {other.get(t, 'not there')} in the distiller's)"
                          for t in differ[:3])
        raise UserError(f"--distiller {distiller} does not share the tokenizer of --llm {llm}: {len(differ)} tokens differ, "
                        f"such as {named}; give a smaller model of the same family with its tokenizer, or layers:N")


def distiller_config(distiller: Distiller | FreeVectors, llm: PreTrainedModel, args) -> dict:
    """What `load_distiller` needs to build the distiller again, for a checkpoint's state. args: the script's flags."""
    config = distiller.backbone and distiller.backbone.config
    return {"llm": identity(llm), "distiller": args.distiller, "distill_len": args.distill_len,
            "vector_start": args.vector_start, "template": args.template,
            "backbone": config and config.to_diff_dict() | {"model_type": config.model_type}}


def load_distiller(path: str | Path, llm: PreTrainedModel) -> tuple[Distiller | FreeVectors, dict]:
    """The distiller of a checkpoint file or run folder, for this LLM, and the checkpoint's state."""
    tensors, state = load_checkpoint(path)
    config, found = state.get("model", {}), identity(llm)
    check(("vector_start" in config, f"{path} is of an older version of this code, without --vector-start; train it again"))
    if config["llm"] != found:
        raise UserError(f"the checkpoint {path} was trained for the LLM {config['llm']}, and this one is {found}; "
                        "vectors speak to one LLM only: give its own --llm, or another checkpoint")
    distiller = build_distiller(config["distiller"], llm, config["distill_len"], config["vector_start"], 0,
                                config["backbone"])
    weights = {k.removeprefix("distiller."): t for k, t in tensors.items() if k.startswith("distiller.")}
    distiller.load_state_dict(weights)
    return distiller, state


def make_encoder(args: argparse.Namespace, tokenizer: Tokenizer, llm, distiller) -> Encoder:
    """The encoder of examples with the length limits of this LLM and distiller (None where no vectors are made)."""
    return Encoder(tokenizer, args.template, args.context_len, args.distill_len, max_positions(llm.config),
                   max_positions(distiller.backbone.config) if distiller is not None and distiller.backbone else None)


def method_of(state: dict) -> str:
    """The method that a checkpoint's training makes it, by the checkpoint's state."""
    if state["model"]["distiller"] == "free":
        return "prompt_tuning"
    stages = state.get("trained_on", {})
    # a checkpoint that is older than the flags for it was trained with their defaults
    distils = "pretrain" in stages and stages["pretrain"].get("objective", "kl") != "clm" or \
        "finetune" in stages and stages["finetune"].get("lam", 1) > 0
    return "mend" if distils or not stages else "hypertuning"


def refuse_wrong_method(methods: list[str], state: dict, path: str) -> None:
    """Raise when a checkpoint was not trained in the way that the method's name says."""
    own = method_of(state)
    holds = {"prompt_tuning": "free vectors (--distiller free)", "mend": "a distiller that was trained with L_distill",
             "hypertuning": "a distiller that was trained without L_distill"}[own]
    check((methods in ([], [own]), (f"{path} holds {holds}; evaluate it with --methods {own}, or give a checkpoint of "
                                    f"{' '.join(methods)} (README, Methods)")))


def refuse_seen_tasks(trained_on: dict, tasks: Tasks, args) -> None:
    """Raise when the checkpoint was finetuned on one of the tasks to evaluate: meta-test tasks must be unseen."""
    stage = trained_on.get("finetune", {})
    collections = json.loads((common.ROOT / "splits.json").read_text())
    for name in {*stage.get("tasks", "").split()} & {*tasks.collection.split()} & collections.keys():
        table = collections[name]["settings"][stage["split"]]
        seen = sorted((set(table["train"]) - set(table["test"])) & set(args.only or tasks.test))
        check((not seen, (f"the checkpoint was finetuned on {stage['split']}, whose training tasks include "
                          f"{', '.join(seen)}; evaluate it on that --split, or on other tasks with --only")))
