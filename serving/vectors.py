"""Files of distilled vectors: our own, and in the forms that other programs read.

    python distill.py --vectors vectors.safetensors --export kv --out cache.safetensors   # docs/serving.md
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from common import UserError, check
from data import Formatter
from loading import identity
from model import demo_prefix, vector_prefix, with_head
from sources.files import write_tensors, write_whole
from sources.headers import check_tensors, read_vectors_header, require_same_llm, sealed


def save_vectors(path: str, vectors: Tensor, about: dict) -> None:
    """Write (l, d) fp32 as the tensor "vectors", with what they belong to in the header."""
    write_tensors(Path(path), {"vectors": vectors.contiguous().cpu()}, sealed("about", about))


def is_vectors_file(path: str) -> bool:
    """Whether `save_vectors` has written it, so that new vectors may take its place."""
    try:
        with safe_open(path, framework="pt") as file:
            return "about" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def read_vectors(path: str, llm: PreTrainedModel) -> tuple[Tensor, dict]:
    """The (l, d) vectors of a file and what they are of; raise UserError where they belong to another LLM."""
    try:
        with safe_open(path, framework="pt") as file:
            vectors, header = file.get_tensor("vectors"), file.metadata()
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"--vectors {path} is no file that --out has written ({error})") from error
    about = read_vectors_header(path, header)
    require_same_llm(f"--vectors {path}", "belong to", about["llm"], identity(llm))
    d, one = llm.get_input_embeddings().embedding_dim, torch.zeros(1, 1, dtype=torch.long, device=llm.device)
    with torch.no_grad():  # how many heads an LLM keeps, its config does not always say
        kept = demo_prefix(llm, one, one == 0).keys_values
    keys = sum(t.numel() for pair in kept for t in pair)
    check((vectors.dim() == 2 and len(vectors) > 0 and vectors.shape[1] in (d, keys + d),
           f"--vectors {path} has vectors of shape {tuple(vectors.shape)}, expected (l, {d}), or (l, "
           f"{keys + d}) of kv:R; take another file"))
    check_tensors(f"--vectors {path}", {"vectors": vectors})
    return vectors.to(llm.device), about


def asked(formatter: Formatter, query: dict, first: bool = False) -> list[int]:
    """x whose answer is written: after it the words, if any, that the template has before an answer."""
    return formatter.query(query, first) + formatter.turns.encode(formatter.turns.cue)


def export_vllm(place: Path, llm: PreTrainedModel, formatter: Formatter, vectors: Tensor, queries: list[dict],
                about: dict) -> None:
    """vLLM's `prompt_embeds`: a safetensors file of "prefix", (h + l, d), which is [head ; S_D], and for each
    query "prompt.0", "prompt.1", ..., (h + l + T_x, d), which are [head ; S_D ; E_x] with x as in `asked`; in
    the LLM's type."""
    prefix, embed = input_rows("vllm", llm, formatter, vectors), llm.get_input_embeddings()
    rows = [torch.tensor(asked(formatter, query), device=llm.device) for query in queries]
    prompts = {f"prompt.{i}": torch.cat([prefix, embed(ids)]) for i, ids in enumerate(rows)}
    write_tensors(place, {name: t.contiguous().cpu() for name, t in (prompts | {"prefix": prefix}).items()},
                  sealed("about", about | {"queries": [query["input"] for query in queries]}))


def export_peft(place: Path, llm: PreTrainedModel, formatter: Formatter, vectors: Tensor, *_) -> None:
    """A folder that peft loads as PromptTuning. Its rows are [head ; S_D]: peft puts them before all that the
    tokenizer gives, so a BOS must be the first of them, and none may stand in the query."""
    rows, config = input_rows("peft", llm, formatter, vectors).float(), llm.config
    name = config._name_or_path
    about = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "inference_mode": True,
             "base_model_name_or_path": Path(name).name if Path(name).exists() else name,
             "num_virtual_tokens": len(rows), "token_dim": rows.shape[1], "num_transformer_submodules": 1,
             "num_attention_heads": config.num_attention_heads, "num_layers": config.num_hidden_layers,
             "prompt_tuning_init": "RANDOM"}
    write_whole(place / "adapter_config.json", json.dumps(about, indent=2) + "\n")
    write_tensors(place / "adapter_model.safetensors", {"prompt_embeddings": rows.contiguous().cpu()},
                  {"format": "pt"})


def export_kv(place: Path, llm: PreTrainedModel, formatter: Formatter, vectors: Tensor, _: list[dict],
              about: dict) -> None:
    """past_key_values: a safetensors file of "keys.0", "values.0", ... for each layer, (1, heads, h + l, head
    width) in the LLM's type, of [head ; S_D]."""
    require_decoder("kv", llm)
    pairs = vector_prefix(llm, vectors[None], formatter.turns.head).keys_values
    tensors = {f"{name}.{i}": t for i, pair in enumerate(pairs)
               for name, t in zip(("keys", "values"), pair, strict=True)}
    write_tensors(place, {name: t.contiguous().cpu() for name, t in tensors.items()}, sealed("about", about))


EXPORTS = {"vllm": export_vllm, "peft": export_peft, "kv": export_kv}  # the choices of --export


def require_decoder(kind: str, llm: PreTrainedModel) -> None:
    check((not llm.config.is_encoder_decoder, f"--export {kind} is for decoder-only LLMs, and this one is an "
           "encoder-decoder, whose encoder reads vectors and query together; leave --export out"))


def input_rows(kind: str, llm: PreTrainedModel, formatter: Formatter, vectors: Tensor) -> Tensor:
    """[head ; S_D] at the LLM's input, (h + l, d) in its type."""
    require_decoder(kind, llm)
    check((vectors.shape[1] == llm.get_input_embeddings().embedding_dim,
           f"--export {kind} hands over embeddings at the LLM's input, and kv:R makes keys and values for "
           "each of its layers; give --export kv, or a --checkpoint of layers:N or a sibling"))
    mask = torch.ones((1, len(vectors)), dtype=torch.bool, device=llm.device)
    return with_head(llm, vectors[None].to(llm.dtype), mask, formatter.turns.head)[0][0]
