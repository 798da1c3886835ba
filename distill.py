"""Your own demonstrations: distil them once into l vectors, and let the frozen LLM answer from these.

    python distill.py --demos demos.jsonl --ask "thin plot, but the actors shine" "two hours I want back"
    python distill.py --demos demos.jsonl --queries queries.jsonl          # labelled queries: accuracies
    python distill.py --demos demos.jsonl --out vectors.safetensors        # keep the vectors
    python distill.py --vectors vectors.safetensors --ask "..."            # no demonstration is read any more
    python distill.py --vectors vectors.safetensors --export kv --out c.safetensors   # for other programs
    python distill.py --checkpoint out/fine --publish my-distiller    # a folder as the hub has them

A line of either file is {"input": ..., "output": ..., "options": [...]}; queries need no output, and nothing
needs options. An answer is chosen among the query's options, else the demonstrations', else their labels
(C of Eq. 1) where there are two and one repeats; else it is written freely. Either file may be a table
(.csv, .tsv, .parquet). Vectors of Eq. (2), Sec. 2, belong to one LLM.
"""

import argparse
import re
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

import common
from common import check, finish, require_finite, run_main, setup
from data import MAX_INPUT, Formatter
from loading import (
    checkpoint_file,
    checkpoint_id,
    identity,
    load_distiller,
    load_llm,
    make_formatter,
    set_length,
)
from score import distil, predict
from serving import pretrained
from serving.vectors import EXPORTS, is_vectors_file, read_vectors, save_vectors
from serving.writer import Writer
from sources.headers import method_of
from sources.own import columns_of, examples_in, kind_of_file
from sources.tasks import require_options
from sources.text import Tokenizer

PUBLISHED = common.ROOT / "checkpoints" / "smollm2-135m.safetensors"


def get_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__, "columns", "segments", "seed", "device", "dtype")
    parser.add_argument("--demos", metavar="FILE", help="demonstrations: .jsonl[.gz], .csv, .tsv or .parquet")
    parser.add_argument("--vectors", metavar="FILE", help="vectors that --out wrote, in place of --demos")
    parser.add_argument("--ask", nargs="+", default=[], metavar="TEXT", help="inputs to answer")
    parser.add_argument("--queries", metavar="FILE", help="inputs to answer, likewise; outputs may lack")
    parser.add_argument("--out", metavar="FILE", help="write the vectors here")
    parser.add_argument("--export", choices=sorted(EXPORTS), help="write --out in another program's form: "
                        "vllm's prompt embeddings (also of each query), a folder for peft, or kv, the LLM's "
                        "past_key_values (docs/serving.md)")
    parser.add_argument("--publish", metavar="FOLDER", help="write --checkpoint here, in bf16 and without "
                        "optimiser: model.safetensors, config.json and a card, ready for the hub")
    parser.add_argument("--checkpoint", default=str(PUBLISHED), help="run folder, checkpoint file or "
                        "published folder; default: the checkpoint that comes along")
    parser.add_argument("--llm", default=common.PRESETS["pocket"]["llm"],
                        help="its frozen LLM: a hub name or a folder; default: that of `make assets`")
    parser.add_argument("--distill-len", type=int, metavar="L", help="vectors to distil into; default: "
                        "as many as --checkpoint was trained for; fewer need --elastic in its training")
    parser.add_argument("--context-len", type=int, default=900, help="demonstration tokens at most")
    parser.add_argument("--answer-tokens", type=int, default=16, help="tokens of a written answer at most")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="of a written answer's softmax; 0: the likeliest token each time")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="draw among the likeliest tokens that hold this share of the probability")
    parser.add_argument("--stop", default="\n", metavar="TEXT", help="a written answer ends before this "
                        "text; default: with its line; '': where the LLM ends it")
    return parser


def read_file(flag: str, path: str, args: argparse.Namespace) -> list[dict]:
    """{"task", "input", "output", "options"} of --demos, or, whose outputs may lack, of --queries."""
    check((Path(path).is_file() and bool(kind_of_file(path)),
           f"{flag} {path} is no file .jsonl[.gz], .csv, .tsv or .parquet; give one, of lines such as "
           '{"input": ..., "output": ...}, or with these columns'))
    return examples_in(Path(path).name, path, columns_of(args.columns), labelled=flag == "--demos")


def labels_of(demos: list[dict]) -> list[str]:
    """What an answer is chosen among where a query names no options: the demonstrations' options, else their
    labels (C of Eq. 1) where there are two and one repeats, else nothing: then the answer is written."""
    options = sorted({option for demo in demos for option in demo["options"]})
    counts = Counter(demo["output"] for demo in demos)
    return options or (sorted(counts) if max(counts.values()) > 1 < len(counts) else [])


def with_options(queries: list[dict], labels: list[str], args: argparse.Namespace) -> list[dict]:
    """The queries, those without options with `labels`; UserError where an output cannot be right."""
    for q in queries:
        check((not (q["output"] and labels) or q["options"] or q["output"] in labels,
               f"{getattr(q, 'where', args.queries)}: the output {q['output']!r} is no label of the "
               f"demonstrations, {labels}; write it as they do, or give the line options"))
    queries = [query | {"options": query["options"] or labels} for query in queries]
    written = any(q["output"] and not q["options"] for q in queries)
    check((not written or args.template != "space" or args.stop != "\n",
           f"{args.queries}: by the template space nothing ends a written answer, so none can be compared; "
           "give options, a --stop of your own, no outputs, or a checkpoint trained with --template newline"))
    return queries


def tell(formatter: Formatter, examples: list[dict], queries: list[dict], labels: list[str]) -> None:
    """Print what answers are, and whose inputs are cut."""
    if any(not query["options"] for query in queries):
        print(f"answers: {'one of ' + ', '.join(labels)[:100] if labels else 'written'}")
    turns = formatter.turns
    cut = [e["input"] for e in examples if len(turns.encode(turns.between + e["input"])) > MAX_INPUT]
    if cut:
        print(f"note: {len(cut)} inputs are cut after {MAX_INPUT} tokens: {cut[0][:40]!r}, ...")


def answer(llm, formatter: Formatter, prefix: Tensor, queries: list[dict], how: dict) -> list[str]:
    """Each query's answer after a prefix of embeddings (P, d), nothing, the demonstrations' or the vectors,
    or of keys and values (P, W). Queries with options are scored, the others' answers written; `how` as in
    Writer.stream."""
    choosing = [query for query in queries if query["options"]]
    require_options([query | {"output": query["output"] or query["options"][0]} for query in choosing],
                    formatter.answer)
    writer = Writer(llm, formatter, prefix)
    chosen = iter(predict(llm, writer.prefix, formatter, choosing, writer.first) if choosing else [])
    written = iter(writer.write([query["input"] for query in queries if not query["options"]], **how))
    return [next(chosen if query["options"] else written) for query in queries]


def room(formatter: Formatter, examples: list[dict], args: argparse.Namespace) -> int:
    """Formatter.limit with --answer-tokens kept free after a query that is answered in writing."""
    limit = formatter.limit(examples)
    if formatter.llm_positions is None:
        return limit
    turns = formatter.turns
    fixed = len(turns.head + turns.tail + turns.encode(turns.cue))
    left = formatter.llm_positions - MAX_INPUT - args.answer_tokens - fixed
    check((left >= max(1, formatter.distill_len), f"--answer-tokens {args.answer_tokens}: the LLM's "
           f"{formatter.llm_positions} positions leave {max(0, left)} for demonstrations or vectors; "
           "give less"))
    return min(limit, left)


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError, with every fault, for flags that do not go together."""
    others = [name for name in ("demos", "vectors", "ask", "queries", "out") if getattr(args, name)]
    folder, out = args.publish and Path(args.publish), args.out
    check((not (folder and others), f"--publish only copies; leave out --{' and --'.join(others)}"),
          (bool(args.demos) != bool(args.vectors) or folder, "give --demos FILE or --vectors FILE"),
          (args.ask or args.queries or out or folder,
           "nothing to do: --ask or --queries to answer, --out to keep the vectors"),
          (not (args.vectors and out and not args.export),
           "--out writes the vectors of --demos; --vectors are in a file already"),
          (not args.export or out, f"--export {args.export} needs a place: give --out"),
          (not out or not Path(out).exists() or is_vectors_file(out),
           f"--out {out} is there already and holds something else; give another name"),
          (not folder or not folder.is_dir() or not any(folder.iterdir()),
           f"--publish {folder} is there already and holds something else; give another name"),
          common.place_rule("--out", out or ""),
          common.place_rule("--publish", str(folder / pretrained.WEIGHTS) if folder else ""),
          *common.shared_rules(args), *common.at_least(args, 1, "answer_tokens", "context_len"),
          *common.finite(args, "temperature"),
          (0 < args.top_p <= 1, f"--top-p is {args.top_p}; give more than 0, and 1 at most"),
          (not (args.vectors and args.distill_len),
           "--distill-len has no part in --vectors, which are made; leave it out"))


def main(argv: list[str] | None = None) -> dict:
    args = get_parser().parse_args(argv)
    check_flags(args)
    if args.publish:
        pretrained.publish(args.checkpoint, Path(args.publish))
        size = checkpoint_file(args.publish).stat().st_size
        return finish({"checkpoint": checkpoint_id(args.publish), "bytes": size})
    demos = read_file("--demos", args.demos, args) if args.demos else []
    queries = [{"task": "--ask", "input": text.strip(), "output": "", "options": []} for text in args.ask]
    queries += read_file("--queries", args.queries, args) if args.queries else []
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
    limit, prefixes = room(formatter, demos + queries, args) if demos or queries else 0, {}
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
        more = f", {len(parts)} segments one by one (icl reads {ids.shape[1]} of the tokens)"
        print(f"{len(kept)} of {len(demos)} demonstrations, {about['tokens']} tokens, distilled into "
              f"{len(vectors)} vectors" + (more if len(parts) > 1 else ""))
    tell(formatter, demos + queries, queries, about["labels"])
    queries = with_options(queries, about["labels"], args)
    if args.out:
        keep(args, llm, formatter, vectors, queries, about)
    result = {name: about[name] for name in ("demonstrations", "tokens")} | {"vectors": len(vectors)}
    if queries:
        how = {"max_new_tokens": args.answer_tokens, "temperature": args.temperature, "top_p": args.top_p,
               "seed": args.seed, "stop": args.stop}
        found = {}
        for way, prefix in (prefixes | {about.get("method", "mend"): vectors}).items():
            started = time.time()
            found[way] = answer(llm, formatter, prefix, queries, how), time.time() - started
        result |= show(queries, found)
    return finish(result)


@torch.no_grad()
def keep(args: argparse.Namespace, llm, formatter: Formatter, vectors: Tensor, queries: list[dict],
         about: dict) -> None:
    """Write the vectors to --out, in the form of --export."""
    if args.export:
        EXPORTS[args.export](Path(args.out), llm, formatter, vectors, queries, about)
        turns, decode = formatter.turns, formatter.tokenizer.hf.decode
        read = turns.between + "{input}" + decode(turns.tail) + turns.cue
        print(f"written to {args.out} for {args.export}; after it a query is read as {read!r}, without BOS")
    else:
        save_vectors(args.out, vectors, about)
        print(f"written to {args.out}: {vectors.numel() * 4 / 1e3:.0f} kB")


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
