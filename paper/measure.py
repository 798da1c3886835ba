"""What bench.py measures with: FLOPs and live bytes, times, peak memory, and models without weights.

Within `no_weights` a model of any size is made of tensors without data, and `Count` sees what running costs.
"""

import argparse
import contextlib
import os
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from common import torch_dtype
from loading import build_distiller, fuse_gelu, load_distiller, load_llm

# --------------------------------------------------------------------------------------------------
# FLOPs, time, memory

ATEN = torch.ops.aten
FORMULAS = flop_registry | {  # torch's own, and the same for its attention on a CPU, which has none there
    ATEN._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)}


class Count(TorchDispatchMode):
    """Counts FLOPs and the bytes of tensors that are alive at once, in `with Count() as count:`.

    flops: of matrix products and attention, a multiplication and an addition each, by the formulas of torch's
    FlopCounterMode; that class itself cannot follow the gradient taken within a forward pass
    (`score.sum_in_chunks`). Attention counts all pairs of positions, masked or not. peak: bytes that were
    made since, without what stood before and without what an operation needs inside itself.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.track((args, kwargs), new=False)
        out = func(*args, **kwargs)
        self.track(out, new=True)
        self.peak = max(self.peak, self.live)
        if func.overloadpacket in FORMULAS:
            self.flops += FORMULAS[func.overloadpacket](*args, **kwargs, out_val=out)
        return out

    def track(self, tensors, new: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                n = storage.nbytes() if new else 0
                self.known.add(storage._cdata)
                self.live += n
                weakref.finalize(storage, self.forget, storage._cdata, n).atexit = False

    def forget(self, key: int, n: int) -> None:
        self.known.discard(key)
        self.live -= n


def interleaved(functions: dict[str, Callable], repeats: int, device: torch.device,
                warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of each function, `repeats` times and in turns, so that other work meets all alike."""
    times = {name: [] for name in functions}
    for i in range(-warm_up, repeats):
        for name, function in functions.items():
            synchronise(device)
            started = time.perf_counter()
            function()
            synchronise(device)
            if i >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU was given to do."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure_peak(prepare: Callable, args: tuple) -> dict:
    """In a child: the peak resident set while prepare(*args)() runs, in all and above what stood before."""
    function = prepare(*args)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the preparation
    before = resident("VmRSS")
    result = function()
    return {"peak_bytes": resident("VmHWM"), "above_bytes": resident("VmHWM") - before, "result": result}


def in_child(environment: dict[str, str], function: Callable, *args):
    """function(*args) in a new process, in which these environment variables stand ("" = not set)."""
    before = {name: os.environ.get(name, "") for name in environment}
    try:
        set_environment(environment)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    finally:
        set_environment(before)


def set_environment(values: dict[str, str]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value:
            os.environ[name] = value


def peak_in_child(prepare: Callable, *args) -> dict:
    """`measure_peak` in a process of its own (Linux). There, tensors over 1 MB go back to the system as soon
    as they are free: glibc would keep pieces of its heap, and the peak would be its own."""
    return in_child({"MALLOC_MMAP_THRESHOLD_": "1000000"}, measure_peak, prepare, args)


# --------------------------------------------------------------------------------------------------
# Models

T5 = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
      "decoder_start_token_id": 0}
CONFIGS = {  # the published architectures, so that neither counting nor --random-init needs a hub
    "gpt2": {"model_type": "gpt2"},
    "gpt2-large": {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "opt-125m": {"model_type": "opt"},
    "opt-6.7b": {"model_type": "opt", "hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384,
                 "num_hidden_layers": 32, "num_attention_heads": 32},
    "t5-small-lm-adapt": {**T5, "d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "t5-large-lm-adapt": {**T5, "d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
    "flan-t5-base": {**T5, "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "flan-t5-xl": {**T5, "d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    # not the paper's; their scaled rotary positions change no shape
    "Llama-3.2-1B": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
                     "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
                     "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
                     "tie_word_embeddings": True},
    "Qwen3-0.6B": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
                   "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
                   "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
                   "tie_word_embeddings": True},
    "Llama-3.1-8B": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
                     "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                     "vocab_size": 128256, "max_position_embeddings": 131072},
    "Llama-3.1-70B": {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
                      "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
                      "vocab_size": 128256, "max_position_embeddings": 131072},
    "Qwen3-32B": {"model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600,
                  "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
                  "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960},
}
# LLMs that a card may not hold, and siblings of one tokenizer as their distillers
SHARDED = {"Llama-3.1-8B": "Llama-3.2-1B", "Qwen3-32B": "Qwen3-0.6B", "Llama-3.1-70B": "Llama-3.2-1B"}
PAIRS = {"gpt2-large": "gpt2", "gpt2-xl": "gpt2",
         "opt-6.7b": "opt-125m"}  # the paper's LLMs and their distillers
T5_PAIRS = {"t5-large-lm-adapt": "t5-small-lm-adapt", "flan-t5-xl": "flan-t5-base"}
OWN_PAIRS = {"Llama-3.2-1B": "layers:5", "Qwen3-0.6B": "layers:9"}  # by the rule of sources/pairs.py


def build_random(llm_name: str, distiller_name: str, distill_len: int, dtype: torch.dtype, device="cpu"):
    """An LLM and its distiller with random weights, or, under `no_weights`, with none; in eval mode."""
    config = CONFIGS.get(Path(llm_name).name)
    config = AutoConfig.for_model(**config) if config else \
        AutoConfig.from_pretrained(llm_name, trust_remote_code=False)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    llm = kind.from_config(config, dtype=dtype)
    if getattr(config, "scale_decoder_outputs",
               None) is False:  # T5 v1.1 has a head of its own; from_config ties it
        llm.lm_head.weight = nn.Parameter(llm.lm_head.weight.detach().clone())
    llm = llm.to(device).eval().requires_grad_(False)
    backbone = None if distiller_name.startswith("layers:") else CONFIGS.get(Path(distiller_name).name) or \
        AutoConfig.from_pretrained(distiller_name, trust_remote_code=False).to_dict()
    return fuse_gelu(llm), build_distiller(distiller_name, llm, distill_len, "plain", 0, backbone).eval()


def load(args: argparse.Namespace, device: torch.device):
    """The LLM and distiller that the flags name: trained, pretrained or random weights."""
    dtype = torch_dtype(args.dtype)
    if args.random_init:
        return build_random(args.llm, args.distiller, args.distill_len, dtype, device)
    llm = load_llm(args.llm, device, dtype)
    distiller = load_distiller(args.checkpoint, llm)[0] if args.checkpoint else \
        build_distiller(args.distiller, llm, args.distill_len, "matched", args.seed)
    return llm, distiller.eval()


def with_flags(args: argparse.Namespace, **changes) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **changes})


@contextlib.contextmanager
def no_weights():
    """Within it tensors have shapes and no data, and operations cost nothing: for `Count`."""
    with FakeTensorMode(), mock.patch.object(nn.Module, "to", lambda module, *_,
                                             **__: module):  # nothing to move
        yield


def weight_bytes(*modules) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
