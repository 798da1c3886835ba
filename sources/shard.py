"""LLMs that one card does not hold: the frozen LLM's layers in equal parts over the ranks (--shard-llm).

    torchrun --nproc_per_node 4 train_finetune.py --preset paper --llm NAME --shard-llm --batch-size 8

torch's FSDP2 gathers a layer's weights when it is run, in the forward and in the backward pass, and lets
them go after it. Embedding, head and norms stay whole on each rank, and so does the distiller, under DDP as
always. Each run of a layer is one of all ranks: they train on different rows, as many each, and evaluate the
same ones.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from common import check, is_main, world
from variants import KeyValueDistiller


def shard_llm(llm: PreTrainedModel, distiller: nn.Module | None, device: torch.device) -> None:
    """Keep 1 / ranks of each layer's weights on each rank's device. The LLM is in memory before, and goes to
    the device layer by layer.

    Raises:
        UserError: there are no ranks; a distiller, or a way to keep the weights, that needs them whole.
    """
    check((dist.is_initialized(), "--shard-llm shares the LLM out over torchrun's ranks, and there is one "
           "process; run it by torchrun --nproc_per_node N"),
          (not isinstance(distiller, KeyValueDistiller), "--shard-llm: kv:R reads with the LLM's own layers, "
           "whole; give --distiller layers:N or a sibling"),
          (not getattr(llm, "is_loaded_in_8bit", False), "--shard-llm: weights in 8 bit are not shared out; "
           "give --llm-weights bf16"))
    layers = [m for m in llm.modules() if isinstance(m, GradientCheckpointingLayer)]
    size = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())
    mesh = init_device_mesh(device.type, (world()[1],))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    llm.to(device)
    if distiller is not None:
        distiller.to(device)
    llm.is_sharded = True
    here = sum(p.to_local().numel() * p.element_size() for layer in layers for p in layer.parameters())
    if is_main():
        print(f"the LLM's {len(layers)} layers, {size / 1e6:.3f} MB, stand on {world()[1]} ranks: "
              f"{here / 1e6:.3f} MB on this one")


def shares(llm: PreTrainedModel) -> tuple[int, int]:
    """(rank, number of ranks) that evaluations are shared out over: with a sharded LLM all do the same."""
    return (0, 1) if getattr(llm, "is_sharded", False) else world()
