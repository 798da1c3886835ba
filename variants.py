"""What stands where MEND's Distiller stands: keys and values in place of vectors, and PromptTuning.

    python train_finetune.py --distiller kv:32 --tasks functions recall --template newline
    python train_finetune.py --distiller free --init-from none --lam 0                   # PromptTuning

DEVIATION, keys and values: MEND's vectors stand at the LLM's input. There a frozen LLM reads little but real
text (results/LOG.md: trained input vectors stay level with D's last l tokens), so KeyValueDistiller speaks to
every layer. It is the LLM itself with low-rank adapters; it reads D, then l - 1 placeholders, and what their
positions and D's first one hold in each layer's cache is S_D. The cost: where an input vector has d numbers,
this one has two widths of the key and value heads a layer and d (21 times as many in SmolLM2-135M). What the
LLM attends to, and the memory that its cache takes after either, is the same l positions.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common import check
from model import causal_mask, places, positions_of, random_rows, run_backbone

SCALE = 2.0  # of what an adapter adds


class Adapter(nn.Module):
    """LoRA (Hu et al., 2022): W x + SCALE B A x, of a frozen layer W, which is neither trained nor saved.

    Args:
        frozen: Linear, or GPT-2's Conv1D. rank: rows of A. B starts at zero, and so the layer as it was.
    """

    def __init__(self, frozen: nn.Module, rank: int, generator: torch.Generator):
        super().__init__()
        object.__setattr__(self, "frozen", frozen)  # hidden from parameters() and state_dict()
        width_in, width_out = frozen.weight.shape if isinstance(frozen, Conv1D) else frozen.weight.shape[::-1]
        self.A = nn.Parameter(torch.randn(rank, width_in, generator=generator) / width_in ** 0.5)
        self.B = nn.Parameter(torch.zeros(width_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        out = self.frozen(x)
        added = F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        return torch.add(out, added.to(out.dtype), alpha=SCALE)


class KeyValueDistiller(nn.Module):
    """S_D as keys and values, in place of model.Distiller; `model.vector_prefix` lets the LLM read them.

    The placeholders start as the embeddings of D's last l - 1 tokens, read once more after D. D's first
    position is kept because attention rests there (Xiao et al., 2024): without it an LLM says nothing sound.

    Args:
        llm: the frozen, decoder-only LLM; the backbone shares its weights. distill_len: l, at least 2.
        rank: of the adapters at every linear layer.

    Raises:
        UserError: the LLM turns keys by a table within its layers (GPT-J), where places cannot be moved.
    """

    residual_embed = None

    def __init__(self, llm: PreTrainedModel, distill_len: int, rank: int, seed: int = 0):
        super().__init__()
        check((hasattr(llm.base_model, "rotary_emb") or not getattr(llm.config, "rotary_dim", None),
               f"--distiller kv:{rank} moves the places of keys, and an LLM of type {llm.config.model_type} "
               "has a table of them; give layers:N or a sibling"))
        shared = {id(t): t for t in [*llm.base_model.parameters(), *llm.base_model.buffers()]}
        backbone, generator = copy.deepcopy(llm.base_model, shared), torch.Generator().manual_seed(seed)
        adapters = {}
        for module in list(backbone.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear | Conv1D):
                    adapters[child] = Adapter(child, rank, generator)
                    setattr(module, name, adapters[child])
        object.__setattr__(self, "backbone", backbone)  # its weights are the LLM's
        object.__setattr__(self, "embed", embed := llm.get_input_embeddings())
        self.adapters = nn.ModuleList(adapters.values())
        self.placeholders = nn.Parameter(torch.zeros(distill_len - 1, embed.embedding_dim))
        self.distill_len = distill_len  # free to shrink: then the last l - 1 placeholders are used

    def forward(self, demo_ids: Tensor, demo_mask: Tensor, segments: int = 1,
                head: Sequence[int] = (), used: Tensor | None = None) -> Tensor:
        """Distil each row's demonstrations.

        Args:
            demo_ids: (B, T_d) long, padded on the left. demo_mask: (B, T_d) bool. segments: S rows
                that follow one another are parts of one D; the first one's first position serves all.
            head: a chat's ids, after whose positions the keys and values will stand.
            used: (B, l) bool, as in model.Distiller: a row of m has D's first position and the last m - 1.
        Returns:
            (B / S, S (l - 1) + 1, layers * 2 * heads * head width + d) fp32: a position's keys and values,
            layer by layer, and its final hidden state.
        """
        used = demo_mask.new_ones(len(demo_ids), self.distill_len) if used is None else used     # (B, l)
        n, used, embeds = used.shape[1] - 1, used[:, :-1], self.embed(demo_ids)             # (B, T_d, d)
        short = max(0, n - demo_ids.shape[1])
        last = F.pad(embeds * demo_mask[:, :, None], (0, 0, short, 0))[:, -n:]              # (B, n, d)
        last = (last + self.placeholders[-n:]).to(embeds.dtype)
        embeds = torch.cat([embeds, last], dim=1)                                           # (B, T_d + n, d)
        mask = torch.cat([demo_mask, used], dim=1)                                          # (B, T_d + n)
        positions, cache = positions_of(mask) + places(head), DynamicCache()
        if hasattr(self.backbone, "rotary_emb"):  # only distances count: the query stands at l, whatever T_d
            earlier = used.sum(dim=1) * (torch.arange(len(used), device=used.device) % segments)     # (B,)
            positions = positions + (1 - demo_mask.sum(dim=1) + earlier)[:, None]
        out = run_backbone(self.backbone, embeds, causal_mask(mask), positions, cache)
        first = (~demo_mask).sum(dim=1, keepdim=True)                                       # (B, 1)
        parts = [t.transpose(1, 2).flatten(2) for layer in cache.layers for t in (layer.keys, layer.values)]
        parts = [torch.cat([t.gather(1, first[:, :, None].expand(-1, -1, t.shape[2])), t[:, -n:]], dim=1)
                 for t in (*parts, out.last_hidden_state)]
        made = torch.cat(parts, dim=2).float().unflatten(0, (-1, segments))                 # (B / S, S, l, W)
        return torch.cat([made[:, 0], made[:, 1:, 1:].flatten(1, 2)], dim=1)


class FreeVectors(nn.Module):
    """PromptTuning (Lester et al., 2021), Sec. 4.1: l free vectors in place of S_D, the same for all D.

    Stands where a Distiller stands, and starts like one's placeholders, from rows of the LLM's own embedding.

    Args:
        embed: the LLM's token embedding, of width d. vocab: V. distill_len: l. seed: of the initial ids.
    """

    backbone = residual_embed = None

    def __init__(self, embed: nn.Module, vocab: int, distill_len: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.vectors = nn.Parameter(random_rows(embed, vocab, distill_len, generator))      # (l, d)

        self.distill_len = distill_len

    def forward(self, demo_ids: Tensor, demo_mask: Tensor, segments: int = 1,
                head: Sequence[int] = (), used: Tensor | None = None) -> Tensor:
        """(B, T_d), (B, T_d) -> (B / S, l, d); what the demonstrations say does not matter."""
        n = self.distill_len if used is None else used.shape[1]
        return self.vectors[-n:].expand(len(demo_ids) // segments, -1, -1)
