"""Your own demonstrations: distil them once into l vectors, and let the frozen LLM answer behind these.

    python distill.py --demos demos.jsonl --ask "thin plot, but the actors shine" "two hours I want back"
    python distill.py --demos demos.jsonl --queries queries.jsonl          # labelled queries: accuracies
    python distill.py --demos demos.jsonl --out vectors.safetensors        # keep the vectors
    python distill.py --vectors vectors.safetensors --ask "..."            # no demonstration is read any more
    python distill.py --checkpoint out/finetune-LLM --publish my-distiller    # a folder as the hub has them

A line of either file is {"input": ..., "output": ..., "options": [...]}; queries need no output, and nothing
needs options. An answer is chosen among the query's options, else the demonstrations', else their labels
where one repeats (C of Eq. 1); else it is written freely. Vectors of Eq. (2), Sec. 2, belong to one LLM.
"""

import argparse
import re
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import common
from common import UserError, check, finish, require_finite, run_main, setup
from data import MAX_INPUT, Formatter
from loading import (
    checkpoint_file,
    checkpoint_id,
    identity,
    load_distiller,
    load_llm,
    make_formatter,
    method_of,
    set_length,
)
from model import vector_prefix, with_head
from score import distil, predict
from serving import pretrained
from sources.files import write_tensors
from sources.headers import check_tensors, read_vectors_header, require_same_llm, sealed
from sources.tasks import require_options
from sources.text import Tokenizer, json_lines

PUBLISHED = common.ROOT / "checkpoints" / "smollm2-135m.safetensors"


def get_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__, "segments", "device", "dtype")
    parser.add_argument("--demos", metavar="FILE", help="demonstrations, one JSON object a line")
    parser.add_argument("--vectors", metavar="FILE", help="vectors that --out wrote, in place of --demos")
    parser.add_argument("--ask", nargs="+", default=[], metavar="TEXT", help="inputs to answer")
    parser.add_argument("--queries", metavar="FILE", help="inputs to answer, one JSON object a line")
    parser.add_argument("--out", metavar="FILE", help="write the vectors here")
    parser.add_argument("--publish", metavar="FOLDER", help="write --checkpoint here, in bf16 and without "
                        "optimiser and flags: model.safetensors, config.json and a card, ready for the hub")
    parser.add_argument("--checkpoint", default=str(PUBLISHED), help="run folder, checkpoint file or "
                        "published folder; default: the checkpoint that comes along")
    parser.add_argument("--llm", default=common.PRESETS["pocket"]["llm"],
                        help="its frozen LLM: a hub name or a folder; default: that of `make assets`")
    parser.add_argument("--distill-len", type=int, metavar="L", help="vectors to distil into; default: "
                        "as many as --checkpoint was trained for; fewer need --elastic in its training")
    parser.add_argument("--context-len", type=int, default=900, help="demonstration tokens at most")
    parser.add_argument("--answer-tokens", type=int, default=16, help="tokens of a written answer at most")
    return parser


def read_lines(path: str, needs: tuple[str, ...]) -> list[dict]:
    """{"task", "input", "output", "options"} of a JSON-lines file; `needs` are the fields that it must have.

    Raises UserError, with the line's number, for anything that is not text where text belongs.
    """
    examples, line = [], '{"input": ..., "output": ...}'
    check((Path(path).is_file(), f"{path} is no file; expected JSON lines such as {line}"))
    for where, row in json_lines(Path(path), line):
        example = {"input": "", "output": "", "options": []} | row
        is_text = all(isinstance(text, str) for text in (example["input"], example["output"]))
        options = example["options"]
        is_list = isinstance(options, list) and all(isinstance(o, str) and o.strip() for o in options)
        check((is_text, f"{where}: input and output must be text in quotes"),
              (is_list, f'{where}: options must be a list of texts, as in ["yes", "no"]'))
        example = {"task": Path(path).name, "input": example["input"].strip(),
                   "output": example["output"].strip(),
                   "options": [option.strip() for option in example["options"]]}
        missing = [name for name in needs if not example[name]]
        check((not missing, f"{where}: {' and '.join(missing)} must not be empty"),
              (not example["options"] or not example["output"] or example["output"] in example["options"],
               f"{where}: the output {example['output']!r} is none of its options {example['options']}"))
        examples.append(example)
    check((bool(examples), f"{path} is empty; give at least one line"))
    return examples


def labels_of(demos: list[dict]) -> list[str]:
    """What an answer is chosen among where a query names no options: the demonstrations' options, else their
    labels (C of Eq. 1) where one repeats, else nothing: then the answer is written."""
    options = sorted({option for demo in demos for option in demo["options"]})
    counts = Counter(demo["output"] for demo in demos)
    return options or (sorted(counts) if max(counts.values()) > 1 else [])


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


@torch.no_grad()
def write_answer(llm, prefix: Tensor, formatter: Formatter, query: dict, tokens: int) -> str:
    """An answer of `tokens` at most, decoded greedily behind a prefix of embeddings (P, d), or of keys and
    values (P, W), and the query."""
    ids = torch.tensor([formatter.query(query, first=len(prefix) == 0)], device=llm.device)
    embed, end = llm.get_input_embeddings(), llm.config.eos_token_id or 0
    head, mask = formatter.turns.head, torch.ones((1, len(prefix)), dtype=torch.bool, device=llm.device)
    if prefix.shape[1] == embed.embedding_dim:
        embeds, _ = with_head(llm, prefix[None].to(llm.dtype), mask, head)
        given = {"inputs_embeds": torch.cat([embeds, embed(ids)], dim=1)}               # (1, P + T, d)
    else:  # generate() wants an id for each position that is in the cache, and does not look at it
        read = vector_prefix(llm, prefix[None], head)
        given = {"input_ids": torch.cat([read.mask.long(), ids], dim=1),                # (1, h + P + T)
                 "past_key_values": read.cache()}
    length = next(iter(given.values())).shape[1]
    seen = torch.ones((1, length), dtype=torch.long, device=llm.device)
    made = llm.generate(**given, attention_mask=seen, max_new_tokens=tokens, do_sample=False,
                        pad_token_id=end if isinstance(end, int) else end[0], output_logits=True,
                        return_dict_in_generate=True)
    require_finite(f"what the LLM predicts behind {query['input'][:60]!r}", torch.stack(made.logits))
    written = made.sequences[:, length if "input_ids" in given else 0:]
    return formatter.tokenizer.hf.decode(written[0], skip_special_tokens=True).strip().split("\n")[0]


def answer(llm, formatter: Formatter, prefix: Tensor, queries: list[dict], tokens: int) -> list[str]:
    """Each query's answer behind a prefix of embeddings (P, d): nothing, the demonstrations' or the vectors.
    Queries with options are scored, the others' answers written, `tokens` at most."""
    choosing = [query for query in queries if query["options"]]
    require_options([query | {"output": query["output"] or query["options"][0]} for query in choosing],
                    formatter.answer)
    read = vector_prefix(llm, prefix[None], formatter.turns.head) if choosing else None
    chosen = iter(predict(llm, read, formatter, choosing, first=len(prefix) == 0) if choosing else [])
    return [next(chosen) if query["options"] else write_answer(llm, prefix, formatter, query, tokens)
            for query in queries]


def room(formatter: Formatter, examples: list[dict], args: argparse.Namespace) -> int:
    """Formatter.limit with --answer-tokens kept free behind a query that is answered in writing."""
    limit = formatter.limit(examples)
    if formatter.llm_positions is None:
        return limit
    fixed = len(formatter.turns.head + formatter.turns.tail)
    left = formatter.llm_positions - MAX_INPUT - args.answer_tokens - fixed
    check((left >= max(1, formatter.distill_len), f"--answer-tokens {args.answer_tokens}: the LLM's "
           f"{formatter.llm_positions} positions leave {left} for demonstrations or vectors; give less"))
    return min(limit, left)


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError, with every fault, for flags that do not go together."""
    others = [name for name in ("demos", "vectors", "ask", "queries", "out") if getattr(args, name)]
    folder, out = args.publish and Path(args.publish), args.out
    check((not (folder and others), f"--publish only copies; leave out --{' and --'.join(others)}"),
          (bool(args.demos) != bool(args.vectors) or folder, "give --demos FILE or --vectors FILE"),
          (args.ask or args.queries or out or folder,
           "nothing to do: --ask or --queries to answer, --out to keep the vectors"),
          (not (args.vectors and out),
           "--out writes the vectors of --demos; --vectors are in a file already"),
          (not out or not Path(out).exists() or is_vectors_file(out),
           f"--out {out} is there already and holds something else; give another name"),
          (not folder or not folder.is_dir() or not any(folder.iterdir()),
           f"--publish {folder} is there already and holds something else; give another name"),
          common.place_rule("--out", out or ""),
          common.place_rule("--publish", str(folder / pretrained.WEIGHTS) if folder else ""),
          *common.shared_rules(args), *common.at_least(args, 1, "answer_tokens", "context_len"),
          (not (args.vectors and args.distill_len),
           "--distill-len has no part in --vectors, which are made; leave it out"))


def main(argv: list[str] | None = None) -> dict:
    args = get_parser().parse_args(argv)
    check_flags(args)
    if args.publish:
        pretrained.publish(args.checkpoint, Path(args.publish))
        size = checkpoint_file(args.publish).stat().st_size
        return finish({"checkpoint": checkpoint_id(args.publish), "bytes": size})
    demos = read_lines(args.demos, ("input", "output")) if args.demos else []
    queries = [{"task": "--ask", "input": text.strip(), "output": "", "options": []} for text in args.ask]
    queries += read_lines(args.queries, ("input",)) if args.queries else []
    check((all(query["input"] for query in queries), "--ask holds an empty text"),
          (not any(re.search("[\ud800-\udfff]", text) for text in args.ask),
           "--ask holds a text that is not UTF-8; write it so"))
    device = setup(args, training=False)
    llm, distiller = load_llm(args.llm, device, common.torch_dtype(args.dtype)), None
    if args.vectors:
        vectors, about = read_vectors(args.vectors, llm)
        args.distill_len, args.template = len(vectors), about["template"]
    else:
        distiller, state = load_distiller(args.checkpoint, llm)
        distiller.eval()
        check((distiller.backbone is not None,
               f"--checkpoint {args.checkpoint} holds free vectors, which read no "
               "demonstrations; give another"))
        set_length(distiller, state, args.distill_len or distiller.distill_len, args.checkpoint)
        args.distill_len, args.template = distiller.distill_len, state["model"]["template"]
    formatter = make_formatter(args, Tokenizer(args.llm), llm, distiller)
    limit, prefixes = room(formatter, demos + queries, args), {}
    if demos:
        parts = formatter.parts(demos, limit)
        kept, pieces = zip(*sum(parts, []), strict=True)
        vectors = distil(parts, distiller, device, args.dtype, formatter.turns.head)[0].float()  # (S l, d)
        ids = torch.tensor([formatter.demonstrations(demos, limit)], device=device)     # (1, T_d)
        require_finite("a distilled vector", vectors)
        with torch.no_grad():
            embeds = llm.get_input_embeddings()(ids[0])                                 # (T_d, d)
            prefixes = {"zero_shot": embeds[:0], "icl": embeds}
        about = {"llm": identity(llm), "checkpoint": checkpoint_id(args.checkpoint),
                 "method": method_of(state), "template": args.template,
                 "demonstrations": len(kept), "tokens": sum(map(len, pieces)), "labels": labels_of(kept)}
        print(f"{len(kept)} of {len(demos)} demonstrations, {about['tokens']} tokens, distilled into "
              f"{len(vectors)} vectors" + (f", {len(parts)} segments one by one" if len(parts) > 1 else ""))
    if args.out:
        save_vectors(args.out, vectors, about)
        print(f"written to {args.out}: {vectors.numel() * 4 / 1e3:.0f} kB")
    result = {name: about[name] for name in ("demonstrations", "tokens")} | {"vectors": len(vectors)}
    if queries:
        queries = [query | {"options": query["options"] or about["labels"]} for query in queries]
        unknown = [q["output"] for q in queries if q["output"] and q["options"]
                   and q["output"] not in q["options"]]
        check((not unknown,
               f"{args.queries}: the output {''.join(unknown[:1])!r} is no label of {about['labels']}"))
        found = {}
        for way, prefix in (prefixes | {about.get("method", "mend"): vectors}).items():
            started = time.time()
            found[way] = answer(llm, formatter, prefix, queries, args.answer_tokens), time.time() - started
        result |= show(queries, found)
    return finish(result)


def show(queries: list[dict], found: dict[str, tuple[list[str], float]]) -> dict:
    """Print 20 answers side by side, and the share of right ones where queries have outputs; return both."""
    for i, query in enumerate(queries):
        if i < 20:
            said = " · ".join(f"{way} {answers[i]!r}" for way, (answers, _) in found.items())
            right = f" · right {query['output']!r}" if query["output"] else ""
            print(f"{query['input'][:100]!r}: {said}{right}")
    metrics = {"answers": {way: answers for way, (answers, _) in found.items()},
               "seconds": {way: round(seconds, 3) for way, (_, seconds) in found.items()}}
    labelled = [i for i, query in enumerate(queries) if query["output"]]
    if labelled:
        right = {way: sum(answers[i] == queries[i]["output"] for i in labelled) / len(labelled)
                 for way, (answers, _) in found.items()}
        said = " · ".join(f"{way} {share:.1%}" for way, share in right.items())
        print(f"right, of {len(labelled)}: {said}")
        metrics["accuracy"] = {way: round(share, 4) for way, share in right.items()}
    return metrics


if __name__ == "__main__":
    run_main(main)
