"""The model of MEND: a distiller makes l vectors of demonstrations, and the frozen LLM reads those instead.

    python train_pretrain.py            # trains the distiller with Eq. (3)
    python train_finetune.py            # trains it on with Eq. (4)

Covers Sec. 2 (Eq. 1 and 2: what the LLM reads) and Sec. 3 (the distiller); the losses stand in score.py.

Legend: B demonstration sets in a batch · K demonstrations in a set · l distillation length
        T_d demonstration tokens · T packed query tokens · P prefix length · N tokens that count in a loss
        d LLM width · d_s distiller width · V vocabulary. Masks are True where a token counts.
        E_D, E_x embeddings of demonstrations and query · S_D the l vectors distilled from D

Every forward of the LLM has two parts. `prefill` reads the prefix (demonstrations or vectors) once and keeps
its keys and values; `query_states` reads the queries after it. Several queries, and several answer options of
one query, stand side by side in one row of the batch: `attention_mask` lets each see the prefix and itself
only, so the prefix is read once however many queries and options follow, and its gradient is exact.

Both kinds of LLM give the same two calls. A decoder-only LLM (GPT-2, OPT, Llama, Qwen, Mistral, Gemma) reads
prefix, query and answer in a row. An encoder-decoder (T5) encodes [prefix ; query] and decodes the answer;
its encoder looks both ways, so there the prefix is read again for each query, shared by its options only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from common import autocast

ENCODER_DECODERS = ("t5", "mt5")  # model types whose relative positions make padding and length of no account


# ---------------------------------------------------------------------------------------------- The distiller


class Distiller(nn.Module):
    """S_D = MEND(concat(E^_D, E^_phi))[-l:], Sec. 3: l placeholders follow the demonstrations; their final
    states, brought to the LLM's width and scale, are the distilled vectors.

    Args:
        backbone: a transformer without head, width d_s: decoder-only (AutoModel), or T5's encoder.
        embed: its token embedding; own_embedding=False for the frozen LLM's: neither trained nor saved then.
        distill_len: l, at least 1.
        llm_width: d. Where d_s differs, Linear + Tanh project d_s -> d.
        output_rms: root mean square of the vectors at initialisation; None leaves their scale as it is.
        residual_embed: the LLM's token embedding, to add those of the last l demonstration tokens; None: not.
        seed: of the placeholders' initial ids.
    """

    def __init__(self, backbone: PreTrainedModel, embed: nn.Module, distill_len: int, llm_width: int,
                 own_embedding: bool = True, output_rms: float | None = None,
                 residual_embed: nn.Module | None = None, seed: int = 0):
        super().__init__()
        self.backbone = backbone
        backbone.set_input_embeddings(nn.Identity())  # the backbone only ever gets embeddings
        if own_embedding:
            self.embed = embed
        else:
            object.__setattr__(self, "embed", embed)  # hidden from parameters() and state_dict()
        object.__setattr__(self, "residual_embed", None)
        generator = torch.Generator().manual_seed(seed)
        vocab = backbone.config.vocab_size
        self.placeholders = nn.Parameter(random_rows(embed, vocab, distill_len, generator))  # (l, d_s)
        self.distill_len = distill_len  # free to shrink: then the last l placeholders are used
        d_s, d, on = self.placeholders.shape[1], llm_width, self.placeholders.device
        self.project = nn.Identity() if d_s == d else nn.Sequential(nn.Linear(d_s, d), nn.Tanh()).to(on)
        self.gain = None
        if output_rms is not None:
            # DEVIATION: final-norm states are some ten times larger than an LLM's token embeddings; a learned
            # scalar that gives both the same root mean square at the start learns faster. The paper has none.
            self.gain = nn.Parameter(torch.ones(()))
            room = (getattr(backbone.config, "max_position_embeddings", None) or 1 << 20) - distill_len
            self.eval()  # no dropout while measuring
            with torch.no_grad():
                probe = torch.randint(0, vocab, (4, min(64, room)), generator=generator).to(on)
                vectors = self(probe, torch.ones_like(probe, dtype=torch.bool))
                self.gain.fill_(output_rms / vectors.pow(2).mean().sqrt())
            self.train()
        object.__setattr__(self, "residual_embed", residual_embed)

    def forward(self, demo_ids: Tensor, demo_mask: Tensor, segments: int = 1,
                head: Sequence[int] = (), used: Tensor | None = None) -> Tensor:
        """Distil each row's demonstrations.

        Args:
            demo_ids: (B, T_d) long, padded on the left: the placeholders follow the last demonstration token.
            demo_mask: (B, T_d) bool. segments: S successive rows are parts of one D. head: not read here.
            used: (B, l) bool: the last placeholders, as many as a row may use; default: distill_len in each.
        Returns:
            (B, l, d) vectors S_D, fp32; of segments, joined: (B / S, S l, d).
        """
        used = demo_mask.new_ones(len(demo_ids), self.distill_len) if used is None else used     # (B, l)
        n, placeholders = used.shape[1], self.placeholders[-used.shape[1]:].expand(len(used), -1, -1)
        embeds = torch.cat([self.embed(demo_ids).to(placeholders.dtype), placeholders], dim=1)
        embeds, mask = padding_first(embeds, torch.cat([demo_mask, used], dim=1))           # (B, T_d + l)
        if self.backbone.config.model_type in ENCODER_DECODERS:  # looks both ways, by relative positions
            out = self.backbone(inputs_embeds=embeds, attention_mask=mask)
        else:
            out = run_backbone(self.backbone, embeds, causal_mask(mask), positions_of(mask))
        vectors = self.project(out.last_hidden_state[:, -n:]).float()                       # (B, l, d)
        if self.gain is not None:
            vectors = vectors * self.gain
        if self.residual_embed is not None:
            # DEVIATION: the vectors start next to what the LLM can read already, the last l demonstration
            # tokens, and the distiller learns what to change. The paper's start lags this for long.
            short = max(0, n - demo_ids.shape[1])
            ids, kept = (F.pad(t, (short, 0))[:, -n:] for t in (demo_ids, demo_mask))
            vectors = vectors + self.residual_embed(ids).float() * kept[:, :, None]         # (B, l, d)
        return vectors.unflatten(0, (-1, segments)).flatten(1, 2)                           # (B / S, S l, d)


def random_rows(embed: nn.Module, vocab: int, n: int, generator: torch.Generator) -> Tensor:
    """(n, width) fp32: embedding rows of ids drawn evenly from [100, vocab): placeholders' start, Sec. 3."""
    if n < 1:
        raise ValueError(f"distill_len is {n}; at least one vector is needed (l >= 1)")
    ids = torch.randint(min(100, vocab // 2), vocab, (n,), generator=generator)
    return embed(ids.to(next(embed.parameters()).device)).detach().float().clone()


# --------------------------------------------------------------------------------------- What the LLM reads


@dataclass
class Prefix:
    """What the LLM keeps of a prefix that it has read.

    keys_values: one (keys, values) pair a layer, each (B, heads, P, head width). state: (B, d), the final
    hidden state of the last prefix token, which predicts the first query token; None for an empty prefix.
    mask: (B, P), bool. embeds: (B, P, d), the prefix itself where it is only read together with the queries:
    then there is neither keys_values nor state.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    state: Tensor | None
    mask: Tensor
    embeds: Tensor | None = None

    def cache(self) -> DynamicCache | None:
        """A new cache on each call: a forward pass would change a shared one in place."""
        return DynamicCache(ddp_cache_data=self.keys_values) if self.keys_values else None


def demo_prefix(llm: PreTrainedModel, demo_ids: Tensor, demo_mask: Tensor,
                head: Sequence[int] = ()) -> Prefix:
    """The LLM reads the demonstrations themselves: [head ; E_D], Eq. (1). demo_ids, demo_mask: (B, T_d).
    head: the fixed ids before them, a BOS or the start of a chat (sources/template.py)."""
    return prefill(llm, *with_head(llm, llm.get_input_embeddings()(demo_ids), demo_mask, head))


def vector_prefix(llm: PreTrainedModel, vectors: Tensor, head: Sequence[int] = (),
                  used: Tensor | None = None) -> Prefix:
    """The LLM reads distilled vectors: [head ; S_D], Eq. (2). vectors: (B, l, d), or, of other width, keys
    and values of variants.py, among them those of D's first token in BOS's place, after a chat's head.
    used: as the distiller had it."""
    d, mask = llm.get_input_embeddings().embedding_dim, vectors.new_ones(vectors.shape[:2], dtype=torch.bool)
    first = int(vectors.shape[2] != d)  # D's first position, once for all segments
    if used is not None:
        mask[:, first:] = used[:, :used.shape[1] - first].reshape(len(vectors), -1)
        vectors, mask = padding_first(vectors, mask)
    if not first:
        return prefill(llm, *with_head(llm, vectors, mask, head))
    config, vectors = llm.config, vectors.to(llm.dtype)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = vectors[:, :, :-d].unflatten(2, (config.num_hidden_layers, 2, -1, width))
    keys_values = layers.permute(2, 3, 0, 4, 1, 5)                          # (layers, 2, B, heads, l, width)
    if h := places(head):
        ids = torch.tensor([head], device=vectors.device).expand(len(vectors), h)           # (B, h)
        before = demo_prefix(llm, ids, torch.ones_like(ids, dtype=torch.bool)).keys_values
        keys_values = [[torch.cat(two, dim=2) for two in zip(*pairs, strict=True)]
                       for pairs in zip(before, keys_values, strict=True)]
        mask = F.pad(mask, (h, 0), value=True)
    return Prefix([(keys, values) for keys, values in keys_values], vectors[:, -1, -d:], mask)


def places(head: Sequence[int]) -> int:
    """Positions of `head` before keys and values, which have D's first token in a single BOS's place."""
    return len(head) if len(head) > 1 else 0


def teacher_and_student(llm: PreTrainedModel, distiller: nn.Module, batch: dict[str, Tensor],
                        head: Sequence[int], dtype: str,
                        with_teacher: bool = True) -> tuple[Tensor | None, Tensor]:
    """The states that predict the queries of data.collate's batch: P_LLM(x | E_D), Eq. (1), and P_LLM(x |
    S_D) with S_D = MEND(E^_D), Eq. (2). Eq. (3) compares them, Eq. (4) reads answers off the student's.

    Args:
        distiller: Distiller, or one of variants.py, perhaps in DDP. dtype: of its autocast, as in --dtype.
    Returns:
        teacher (None where `with_teacher` is False), student: (B, T, d), as query_states.
    """
    teacher, used, demo_ids, part_ids = None, batch.get("used"), batch["demo_ids"], batch["part_ids"]
    if with_teacher:
        with torch.no_grad():
            teacher = query_states(llm, demo_prefix(llm, demo_ids, batch["demo_mask"], head), batch)
    with autocast(demo_ids.device, dtype):
        vectors = distiller(part_ids, batch["part_mask"], len(part_ids) // len(demo_ids), head, used)
    # not under no_grad: the LLM is frozen, but the gradient flows through it to the vectors
    return teacher, query_states(llm, vector_prefix(llm, vectors, head, used), batch)


def with_head(llm: PreTrainedModel, embeds: Tensor, mask: Tensor,
              head: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The ids of `head` after each row's padding, before its first token: (B, P, d) -> (B, h + P, d)."""
    if not head:
        return embeds, mask
    fixed = llm.get_input_embeddings()(torch.tensor(head, device=embeds.device)).to(embeds.dtype)   # (h, d)
    embeds = torch.cat([fixed.expand(len(embeds), -1, -1), embeds], dim=1)                  # (B, h + P, d)
    return padding_first(embeds, F.pad(mask, (len(head), 0), value=True))


def padding_first(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's padding to the left of what counts, which keeps its order: (B, P, d), (B, P) -> the same."""
    mask, order = mask.long().sort(dim=1, stable=True)                                      # (B, P)
    return embeds.gather(1, order[:, :, None].expand_as(embeds)), mask > 0


def prefill(llm: PreTrainedModel, embeds: Tensor, mask: Tensor) -> Prefix:
    """Read a prefix once: demonstrations E_D (teacher, ICL) or distilled vectors S_D (student, MEND).

    The LLM's weights are frozen, but gradients flow through it to `embeds`; call the teacher under no_grad.

    Args:
        embeds: (B, P, d), in any float type. mask: (B, P) bool, False in padding, which stands on the left.
    """
    embeds = embeds.to(llm.dtype)
    # a layer that runs again in the backward pass would find its own keys and values in a cache
    runs_again = getattr(llm, "checkpoints_layers", False) and torch.is_grad_enabled()
    if embeds.shape[1] == 0 and not llm.config.is_encoder_decoder:
        return Prefix([], None, mask)
    if llm.config.is_encoder_decoder or runs_again:
        return Prefix([], None, mask, embeds)
    cache = DynamicCache()
    out = run_backbone(llm.base_model, embeds, causal_mask(mask), positions_of(mask), cache)
    keys_values = [(layer.keys, layer.values) for layer in cache.layers]
    return Prefix(keys_values, out.last_hidden_state[:, -1], mask)


def query_states(llm: PreTrainedModel, prefix: Prefix, batch: dict[str, Tensor]) -> Tensor:
    """Read the packed queries after a prefix; return for each query token the state that predicts it.

    The first token of a query is predicted by the last prefix token (the last demonstration token for the
    teacher, the last vector for the student); the first token of an answer by the last token of its query.

    Args:
        batch: of data.collate: query_ids, query_mask, query, branch, position, predictor, all (B, T).
    Returns:
        (B, T, d) final hidden states. Without a prefix those for first tokens are zeros, and so are those for
        x with an encoder-decoder LLM, which predicts only answers: `loss_mask` leaves them out.
    """
    if llm.config.is_encoder_decoder:
        return answer_states(llm, prefix, batch)
    embeds = llm.get_input_embeddings()(batch["query_ids"])                                 # (B, T, d)
    allowed = attention_mask(prefix.mask, batch["query"], batch["branch"], batch["query_mask"])
    positions = batch["position"] + prefix.mask.sum(dim=1, keepdim=True)                    # (B, T)
    T, d = embeds.shape[1:]
    if prefix.embeds is None:
        out = run_backbone(llm.base_model, embeds, allowed, positions, prefix.cache(), prefix.mask)
        states = out.last_hidden_state                                                      # (B, T, d)
        first = torch.zeros_like(states[:, 0]) if prefix.state is None else prefix.state    # (B, d)
        states = torch.cat([first[:, None], states], dim=1)                                 # (B, 1 + T, d)
    else:  # prefix and queries in one pass, without a cache
        embeds = torch.cat([prefix.embeds, embeds], dim=1)                                  # (B, P + T, d)
        allowed = torch.cat([F.pad(causal_mask(prefix.mask), (0, T)), allowed], dim=2)     # (B, 1, P+T, P+T)
        positions = torch.cat([positions_of(prefix.mask), positions], dim=1)                # (B, P + T)
        out = run_backbone(llm.base_model, embeds, allowed, positions)
        states = out.last_hidden_state[:, -T - 1:]                                          # (B, 1 + T, d)
    return states.gather(1, batch["predictor"][:, :, None].expand(-1, -1, d))               # (B, T, d)


def head_logits(llm: PreTrainedModel, states: Tensor) -> Tensor:
    """The LLM's output head applied by hand: (N, d) final hidden states -> (N, V) fp32 logits."""
    if getattr(llm.config, "scale_decoder_outputs", False):  # T5 whose head is tied to its embedding
        states = states * llm.config.d_model ** -0.5
    logits = llm.get_output_embeddings()(states.to(llm.dtype)).float()
    soft_cap = getattr(llm.config, "final_logit_softcapping", None)  # Gemma
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits


def answer_mask(batch: dict[str, Tensor]) -> Tensor:
    """The tokens of answers y, (B, T) bool: those that L_pred averages over and that score an option."""
    return batch["query_mask"] & (batch["branch"] > 0)


def loss_mask(llm: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The tokens that L_distill compares, (B, T) bool: all of x and y (DEVIATION: Eq. (3) has x alone); of an
    encoder-decoder LLM, which predicts no token of x, those of y."""
    return answer_mask(batch) if llm.config.is_encoder_decoder else batch["query_mask"]


# -------------------------------------------------------------------------- Packing: who sees whom, and where


def attention_mask(prefix_mask: Tensor, query: Tensor, branch: Tensor, query_mask: Tensor) -> Tensor:
    """Who may look at whom when queries are packed side by side after a prefix.

    A token sees the prefix, the earlier tokens of its own query (`query`), and of its own answer option
    (branch): branch 0 is the query x, which every option of that query sees; options do not see each other.

    Args:
        prefix_mask: (B, P) bool. query, branch: (B, T) long. query_mask: (B, T) bool.
    Returns:
        (B, 1, T, P + T) bool, True where allowed. A padded token sees itself, so that no row is empty.
    """
    T = query.shape[1]
    same_query = query[:, :, None] == query[:, None, :]                                     # (B, T, T)
    same_branch = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])    # (B, T, T)
    index = torch.arange(T, device=query.device)
    causal, itself = index[:, None] >= index[None, :], index[:, None] == index[None, :]     # (T, T)
    own = (same_query & same_branch & causal & query_mask[:, None, :]) | itself             # (B, T, T)
    return torch.cat([prefix_mask[:, None, :].expand(-1, T, -1), own], dim=2)[:, None]      # (B, 1, T, P+T)


def causal_mask(mask: Tensor) -> Tensor:
    """Causal attention over one sequence a row, padded anywhere: (B, T) bool -> (B, 1, T, T) bool."""
    zero = torch.zeros_like(mask, dtype=torch.long)
    return attention_mask(mask[:, :0], zero, zero, mask)


def positions_of(mask: Tensor) -> Tensor:
    """Position of each token, padding not counted: (B, T) bool -> (B, T) long, 0 in padding on the left."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def window_masks(config, allowed: Tensor, positions: Tensor,
                 key_positions: Tensor) -> Tensor | dict[str, Tensor]:
    """`allowed`, narrowed where layers see the last `sliding_window` positions only (Mistral, Qwen, Gemma).

    Args:
        allowed: (B, 1, T, P + T) bool. positions: (B, T) long. key_positions: (B, P + T) long.
    Returns:
        one mask, or, for a backbone whose layers differ, one for each kind of layer, as it takes them.
    """
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if window is None or (kinds and "sliding_attention" not in kinds):
        return allowed
    near = positions[:, None, :, None] - key_positions[:, None, None, :] < window           # (B, 1, T, P+T)
    return {"full_attention": allowed, "sliding_attention": allowed & near} if kinds else allowed & near


def run_backbone(backbone: nn.Module, embeds: Tensor, allowed: Tensor, positions: Tensor,
                 cache: DynamicCache | None = None, prefix_mask: Tensor | None = None):
    """One pass of a decoder-only backbone (no head) over `embeds` with our own mask and positions.

    Args:
        embeds: (B, T, width). allowed: (B, 1, T, P + T) bool. positions: (B, T) long.
        cache, prefix_mask: of P earlier tokens.
    """
    earlier = [] if prefix_mask is None else [positions_of(prefix_mask)]
    masks = window_masks(backbone.config, allowed, positions, torch.cat([*earlier, positions], dim=1))

    def bias(mask: Tensor) -> Tensor:
        """What is added to the scores, made here once: torch would make it of a bool mask in every layer."""
        return torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, torch.finfo(embeds.dtype).min)

    masks = {kind: bias(mask) for kind, mask in masks.items()} if isinstance(masks, dict) else bias(masks)
    return backbone(inputs_embeds=embeds, attention_mask=masks, position_ids=positions,
                    past_key_values=cache, use_cache=cache is not None)


# ----------------------------------------------------------------------------------- Encoder-decoder LLMs: T5


def answer_states(llm: PreTrainedModel, prefix: Prefix, batch: dict[str, Tensor]) -> Tensor:
    """query_states of an encoder-decoder LLM: encode [prefix ; E_x] once a query, then decode its options.

    DEVIATION: the paper does not say on which side the query stands. Here the encoder reads [S_D ; E_x] and
    the decoder writes y, as Eq. (2) conditions on both; in pretraining, whose rows have an empty query, the
    encoder reads D or S_D and the decoder writes x. An encoder with nothing to read gets the end-of-sequence
    token, which is what T5's tokenizer makes of an empty text.
    """
    mask, number, branch, position = (batch[k] for k in ("query_mask", "query", "branch", "position"))
    (B, T), device = mask.shape, mask.device
    Q, options = int(number.max()) + 1, int(branch.max()) + 1
    query_of = torch.arange(B, device=device)[:, None] * Q + number                         # (B, T)
    in_x, in_y = mask & (branch == 0), answer_mask(batch)

    # one encoder input a query; a query without x, or without options, is a row that nobody looks at
    x_len = torch.bincount(query_of[in_x], minlength=B * Q)                                 # (B Q,)
    ids = torch.full((B * Q, max(1, int(x_len.max()))), llm.config.eos_token_id, device=device)
    ids[query_of[in_x], position[in_x]] = batch["query_ids"][in_x]                          # (B Q, T_x)
    prefix_mask = prefix.mask.repeat_interleave(Q, dim=0)                                   # (B Q, P)
    lengths = torch.where(prefix_mask.any(dim=1), x_len, x_len.clamp(min=1))                # (B Q,)
    x_mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]                   # (B Q, T_x)
    embeds = torch.cat([prefix.embeds.repeat_interleave(Q, dim=0), llm.get_input_embeddings()(ids)], dim=1)
    encoder_mask = torch.cat([prefix_mask, x_mask], dim=1)                                  # (B Q, P + T_x)
    encoded = llm.get_encoder()(inputs_embeds=embeds, attention_mask=encoder_mask).last_hidden_state

    # one decoder input an option: the start token, then y without its last token
    of_option = query_of[in_y] * options + branch[in_y]                                     # (N,)
    numbers, option_of = torch.unique(of_option, return_inverse=True)                       # (O,), (N,)
    place, query = position[in_y] - x_len[query_of[in_y]], numbers // options               # (N,), (O,)
    ids = torch.full((len(numbers), int(place.max()) + 2), llm.config.decoder_start_token_id, device=device)
    ids[option_of, place + 1] = batch["query_ids"][in_y]
    decoded = llm.get_decoder()(input_ids=ids[:, :-1], encoder_hidden_states=encoded[query], use_cache=False,
                                encoder_attention_mask=encoder_mask[query]).last_hidden_state  # (O, T_y, d)
    states = decoded.new_zeros(B, T, decoded.shape[2])
    return states.index_put(in_y.nonzero(as_tuple=True), decoded[option_of, place])         # (B, T, d)
