"""What one training step needs, and so which card it fits, without weights: `python bench.py --plan`."""

import argparse
import functools
import itertools
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

import score
from data import collate
from loading import checkpoint_layers
from model import Prefix
from paper.measure import (
    CONFIGS,
    OWN_PAIRS,
    PAIRS,
    SHARDED,
    T5_PAIRS,
    Count,
    build_random,
    no_weights,
    weight_bytes,
)
from paper.speed import training_step
from sources.pairs import settle_distiller, usual_distiller

CARDS = (16, 24, 40, 80)  # GB of memory
SIZES, RANKS = (24, 80), (2, 4, 8)  # of cards in GB, and how many share an LLM
GB = 1e9
ANSWER = 4                # tokens of the answer in a planned step
STEPS, RATE = 30000, 50e12  # of a stage (Table 5); FLOP/s, 40% of an A10's 16-bit peak
KNOWN = PAIRS | T5_PAIRS | OWN_PAIRS


def plan_one(name: str, args: argparse.Namespace, batch_size: int, checkpointing: bool,
             distiller: str | None = None) -> dict:
    """FLOPs and memory of one step of Eq. (4), LLM in 16 bit: weights, AdamW's state, what is alive at once.
    distiller: of the LLM `name`; None: the one of KNOWN.

    With checkpointing the frozen LLM's layers are run again in the backward pass. In 8 bit (bitsandbytes)
    each weight of the layers' matrices takes one byte, but for T5's `wo`, which stays as it is, and the
    backward pass unpacks one matrix at a time.
    """
    chunk = functools.partial(score.sum_in_chunks, chunk=1024)  # what a GPU takes, where counting has none
    with no_weights(), mock.patch.object(score, "sum_in_chunks", chunk):
        llm, distiller = build_random(name, distiller or KNOWN[name], args.distill_len, torch.bfloat16)
        row = {"demo": [0] * args.demo_tokens,
               "queries": [([0] * (args.query_tokens - ANSWER), [[0] * ANSWER])]}
        batch, columns = collate([row] * batch_size), torch.arange(batch_size * args.query_tokens)
        answers, read = columns[:ANSWER * batch_size], None
        if llm.config.is_encoder_decoder:
            columns, read = answers, functools.partial(read_answers, llm, batch["query_ids"])
        if checkpointing:
            checkpoint_layers(llm)
        distiller.train()
        let_attention_fuse(distiller)
        with Count() as count:
            training_step(llm, distiller, batch, (columns, answers), "bf16", read)
    head, kept = llm.get_output_embeddings(), tuple(llm._keep_in_fp32_modules or ())
    matrices = [m.weight.numel() for n, m in llm.named_modules()
                if isinstance(m, nn.Linear | Conv1D) and m is not head and not n.endswith(kept)]
    adam = 8 * sum(p.numel() for p in distiller.parameters() if p.requires_grad)
    memory = {"llm": weight_bytes(llm), "distiller": weight_bytes(distiller) + adam, "alive": count.peak}
    layers = [weight_bytes(m) for m in llm.modules() if isinstance(m, GradientCheckpointingLayer)]
    in_8_bit = memory | {"llm": memory["llm"] - sum(matrices) + 2 * max(matrices)}
    return {"flops": count.flops, "bytes": memory, "layer_bytes": layers,
            "peak_bytes": {"16 bit": sum(memory.values()), "8 bit": sum(in_8_bit.values())}}


def read_answers(llm, query_ids: Tensor, prefix: Prefix) -> Tensor:
    """`model.answer_states` where a row is one query with one option, its last ANSWER tokens: the same
    passes, without a look at the data, of which there is none. query_ids: (B, T) -> (B, T, d)."""
    x, y = query_ids[:, :-ANSWER], query_ids[:, -ANSWER:]
    embeds = torch.cat([prefix.embeds, llm.get_input_embeddings()(x)], dim=1)           # (B, P + T_x, d)
    mask = torch.cat([prefix.mask, torch.ones_like(x, dtype=torch.bool)], dim=1)        # (B, P + T_x)
    encoded = llm.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    states = llm.get_decoder()(input_ids=y, encoder_hidden_states=encoded, encoder_attention_mask=mask,
                               use_cache=False).last_hidden_state                       # (B, T_y, d)
    return F.pad(states, (0, 0, x.shape[1], 0))


def let_attention_fuse(distiller: nn.Module) -> None:
    """Turn off what a GPU does within the fused attention, where the CPU's kernels would write all scores
    out: dropout, which elsewhere takes a byte a number, left out, and the gradient of T5's position bias."""
    for module in distiller.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # OPT, T5
            module.dropout = 0.0
        if (bias := getattr(module, "relative_attention_bias", None)) is not None:
            bias.requires_grad_(False)


def plan(args: argparse.Namespace) -> list[dict]:
    """Which card a training step fits: counted memory, and 1.5 GB for what torch itself takes and cannot
    use; and the hours of a stage's steps on an A10, by FLOPs alone. Of --llm and --distiller where these were
    given, else of the LLMs of KNOWN."""
    pairs = KNOWN
    if "llm" not in getattr(args, "filled_in", ("llm",)):
        name = Path(args.llm).name
        if name in KNOWN and "distiller" in args.filled_in:
            args.distiller = KNOWN[name]
        elif name not in CONFIGS:
            settle_distiller(args)
        elif "distiller" in args.filled_in:  # by the same rule, without the hub
            args.distiller = usual_distiller(name, AutoConfig.for_model(**CONFIGS[name]).num_hidden_layers)
        pairs = {args.llm: args.distiller}
    print(f"one step of Eq. (4): {args.demo_tokens} demonstration and {args.query_tokens} query tokens, "
          f"l = {args.distill_len}")
    print(f"hours: an estimate for {STEPS:,} steps at {RATE / 1e12:.0f} TFLOP/s, not run")
    print(f"{'LLM':18s}{'batch':>6s}{'checkpointing':>14s}{'TFLOP':>8s}{'hours':>7s}"
          f"{'16 bit GB':>11s}{'fits':>14s}{'8 bit GB':>10s}{'fits':>14s}")
    found = []
    for (name, distiller), batch_size, checkpointing in itertools.product(pairs.items(), (1, 8),
                                                                          (False, True)):
        r = plan_one(name, args, batch_size, checkpointing, distiller)
        r["hours"] = round(r["flops"] * STEPS / RATE / 3600, 2)
        line = f"{Path(name).name:18s}{batch_size:6d}{'yes' if checkpointing else 'no':>14s}"
        line += f"{r['flops'] / 1e12:8.2f}{r['hours']:7.1f}"
        fits = {}
        for bits, width in (("16 bit", 11), ("8 bit", 10)):
            fits[bits] = [card for card in CARDS if r["peak_bytes"][bits] + 1.5 * GB <= card * GB]
            line += f"{r['peak_bytes'][bits] / GB:{width}.1f}{' '.join(map(str, fits[bits])) or 'none':>14s}"
        print(line)
        found.append({"llm": name, "distiller": distiller, "batch_size": batch_size,
                      "checkpointing": checkpointing, **r, "fits_gb": fits})
    return found


def plan_sharded(args: argparse.Namespace) -> list[dict]:
    """The memory of each of 1, 2, 4 and 8 cards in a step of one row a card, the LLM whole on each or, by
    --shard-llm, its layers in parts: a rank keeps its part, and of two layers the whole while they run."""
    print(f"\none row a card, --grad-checkpoint, 16 bit: GB a card by --shard-llm, and which of {SIZES} fit")
    print(f"{'LLM':16s}{'distiller':14s}" + "".join(f"{f'{n} card(s)':>18s}" for n in (1, *RANKS)))
    found = []
    for name, distiller in SHARDED.items():
        r = plan_one(name, args, 1, True, distiller)
        layers, whole = r["layer_bytes"], r["peak_bytes"]["16 bit"]
        peaks = {1: whole} | {n: whole - sum(layers) + sum(layers) / n + 2 * max(layers) for n in RANKS}
        fits = {n: [card for card in SIZES if peak + 1.5 * GB <= card * GB] for n, peak in peaks.items()}
        print(f"{name:16s}{distiller:14s}" + "".join(
            f"{peaks[n] / GB:10.1f}{' '.join(map(str, fits[n])) or 'none':>8s}" for n in peaks))
        found.append({"llm": name, "distiller": distiller, "peak_bytes": peaks, "fits_gb": fits})
    return found
