"""Files of distilled vectors: our own, and in the forms that other programs read."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from common import UserError, check
from loading import identity
from sources.files import write_tensors
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


def read_vectors(path: str, llm) -> tuple[Tensor, dict]:
    """The (l, d) vectors of a file and what they are of; raise UserError where they belong to another LLM."""
    try:
        with safe_open(path, framework="pt") as file:
            vectors, header = file.get_tensor("vectors"), file.metadata()
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"--vectors {path} is no file that --out has written ({error})") from error
    about, config = read_vectors_header(path, header), llm.config
    require_same_llm(f"--vectors {path}", "belong to", about["llm"], identity(llm))
    d, heads = llm.get_input_embeddings().embedding_dim, getattr(config, "num_attention_heads", 1)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_width
    check((vectors.dim() == 2 and len(vectors) > 0 and vectors.shape[1] in (d, keys + d),
           f"--vectors {path} has vectors of shape {tuple(vectors.shape)}, expected (l, {d}), or (l, "
           f"{keys + d}) of kv:R; take another file"))
    check_tensors(f"--vectors {path}", {"vectors": vectors})
    return vectors.to(llm.device), about
