"""Models of sizes that can be counted by hand, for what bench.py and paper/ count."""

from paper import measure

# every name that the code asks for, so small that a count takes no time; widths and depths all differ
TINY = {
    "gpt2": {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 500},
    "gpt2-large": {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 500},
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 80, "n_layer": 5, "n_head": 5, "vocab_size": 500},
    "opt-125m": {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 128,
                 "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 500},
    "opt-6.7b": {"model_type": "opt", "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256,
                 "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 500},
    "t5-small-lm-adapt": {**measure.T5, "d_model": 48, "d_ff": 80, "num_layers": 2, "num_heads": 3, "d_kv": 8,
                          "vocab_size": 500},
    "t5-large-lm-adapt": {**measure.T5, "d_model": 64, "d_ff": 96, "num_layers": 4, "num_heads": 4, "d_kv": 8,
                          "vocab_size": 500},
    "flan-t5-base": {**measure.T5, "d_model": 32, "d_ff": 64, "num_layers": 3, "num_heads": 2,
                     "vocab_size": 500},
    "flan-t5-xl": {**measure.T5, "d_model": 80, "d_ff": 160, "num_layers": 5, "num_heads": 4,
                   "vocab_size": 500},
    "Llama-3.2-1B": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 160,
                     "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
                     "head_dim": 16, "vocab_size": 500},
    **{name: {"model_type": kind, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 9,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 500}
       for name, kind in (("Llama-3.1-8B", "llama"), ("Llama-3.1-70B", "llama"), ("Qwen3-32B", "qwen3"))},
    "Qwen3-0.6B": {"model_type": "qwen3", "hidden_size": 48, "intermediate_size": 96,
                   "num_hidden_layers": 10, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "head_dim": 16, "vocab_size": 500},
}
T_D, T_X, L, V = 30, 9, 5, 500
WIDTH, LAYERS, WIDTH_S, LAYERS_S = 64, 4, 48, 2  # of gpt2-large and gpt2 above


def matrices(width, layers, tokens):
    """4 d^2 of attention and 8 d^2 of the two others, a multiplication and an addition each."""
    return 2 * 12 * width * width * layers * tokens


def attention(width, layers, tokens, seen):
    """Scores and weighted sum: 2 d FLOPs each for a pair."""
    return 4 * width * layers * tokens * seen


def flops_by_hand(config, demo_tokens: int, query_tokens: int, distiller_config, distill_len: int) -> dict:
    """ICL's and MEND's FLOPs with all logits from the published sizes: the check of what is counted.

    A layer of width d has 12 d^2 weights, 2 FLOPs each a token, and 4 d FLOPs for each pair of positions;
    the head has 2 d V a token.
    """
    def layers(c, tokens: int) -> float:
        return c.num_hidden_layers * (24 * c.hidden_size ** 2 * tokens + 4 * c.hidden_size * tokens ** 2)

    def head(tokens: int) -> float:
        return 2 * config.hidden_size * config.vocab_size * tokens

    icl, mend = demo_tokens + query_tokens, distill_len + query_tokens
    project = 2 * distiller_config.hidden_size * config.hidden_size * distill_len
    distil = layers(distiller_config, demo_tokens + distill_len) + project
    return {"icl": layers(config, icl) + head(icl), "mend": distil + layers(config, mend) + head(mend)}
