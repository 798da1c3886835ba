"""Your own demonstrations: distil them once into l vectors, and let the frozen LLM answer behind these.

    python distill.py --demos demos.jsonl --ask "the plot is thin but the actors shine" "two hours I want back"
    python distill.py --demos demos.jsonl --queries queries.jsonl          # labelled queries: accuracies, side by side
    python distill.py --demos demos.jsonl --out vectors.safetensors        # keep the vectors
    python distill.py --vectors vectors.safetensors --ask "..."            # no demonstration is read any more
    python distill.py --checkpoint out/finetune-LLM --export my.safetensors   # a run's weights alone, to be published

A line of either file is {"input": ..., "output": ..., "options": [...]}; queries need no output, and options are optional: without
them an answer is chosen among the demonstrations' labels, as in Eq. (1), where one of these repeats, and written freely
where none does. Vectors of Eq. (2), Sec. 2; they belong to one LLM.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import common
from common import UserError, check, finish, run_main, setup
from data import Encoder, Tokenizer
from evaluate import make_encoder, one_prefix, predict
from model import identity, load_distiller, load_llm, vector_prefix, with_bos

PUBLISHED = common.ROOT / "checkpoints" / "smollm2-135m-class_to_class.safetensors"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demos", metavar="FILE", help="demonstrations, one JSON object a line")
    parser.add_argument("--vectors", metavar="FILE", help="vectors that --out wrote, in place of --demos")
    parser.add_argument("--ask", nargs="+", default=[], metavar="TEXT", help="inputs to answer")
    parser.add_argument("--queries", metavar="FILE", help="inputs to answer, one JSON object a line")
    parser.add_argument("--out", metavar="FILE", help="write the vectors here")
    parser.add_argument("--export", metavar="FILE", help="write --checkpoint's weights here in bf16, without optimiser and flags")
    parser.add_argument("--checkpoint", default=str(PUBLISHED),
                        help="run folder or checkpoint file; default: the published one, which belongs to SmolLM2-135M-Instruct")
    parser.add_argument("--llm", default=common.PRESETS["pocket"]["llm"], help="its frozen LLM: a hub name or a folder; "
                        "default: SmolLM2-135M-Instruct, from `make assets`")
    parser.add_argument("--context-len", type=int, default=900, help="demonstration tokens at most")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="as in evaluate.py")
    return parser


def read_lines(path: str, needs: tuple[str, ...]) -> list[dict]:
    """{"task", "input", "output", "options"} of a JSON-lines file; `needs` are the fields that a line must have."""
    check((Path(path).is_file(), f"{path} does not exist; expected JSON lines such as {{\"input\": ..., \"output\": ...}}"))
    examples = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            example = {"task": Path(path).name, "input": str(row["input"]).strip(), "output": str(row.get("output", "")).strip(),
                       "options": [str(option).strip() for option in row.get("options") or []]}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{path}, line {number}: expected {{"input": ..., "output": ...}} '
                            f"({type(error).__name__}: {error})") from error
        missing = [name for name in needs if not example[name]]
        check((not missing, f"{path}, line {number}: {' and '.join(missing)} must not be empty"))
        examples.append(example)
    check((bool(examples), f"{path} is empty; give at least one line"))
    return examples


def labels_of(demos: list[dict]) -> list[str]:
    """What an answer is chosen among where a query names no options: the demonstrations' options, else their labels (C
    of Eq. 1) where one repeats, else nothing: then the answer is written."""
    options = sorted({option for demo in demos for option in demo["options"]})
    counts = Counter(demo["output"] for demo in demos)
    return options or (sorted(counts) if max(counts.values()) > 1 else [])


def save_vectors(path: str, vectors: Tensor, about: dict) -> None:
    """Write (l, d) fp32 as the tensor "vectors", with what they belong to in the header."""
    save_file({"vectors": vectors.contiguous().cpu()}, path, metadata={"about": json.dumps(about)})


def read_vectors(path: str, llm) -> tuple[Tensor, dict]:
    """The (l, d) vectors of a file and what they are of; raise UserError where they belong to another LLM."""
    try:
        with safe_open(path, framework="pt") as file:
            vectors, about = file.get_tensor("vectors"), json.loads(file.metadata()["about"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"--vectors {path} is no file that --out has written ({error})") from error
    found = identity(llm)
    check((about["llm"] == found, f"--vectors {path} belong to the LLM {about['llm']}, and this one is {found}; give its own --llm"))
    return vectors.to(llm.device), about


@torch.no_grad()
def write_answer(llm, prefix: Tensor, encoder: Encoder, query: dict, tokens: int) -> str:
    """An answer of at most `tokens` tokens, decoded greedily behind a prefix (P, d) of embeddings and the query."""
    ids = torch.tensor([encoder.query(query, first=len(prefix) == 0)], device=llm.device)
    prefix = prefix[None].to(llm.dtype)
    embeds, _ = with_bos(llm, prefix, torch.ones(prefix.shape[:2], dtype=torch.bool, device=llm.device),
                            encoder.tokenizer.bos_id)
    embeds = torch.cat([embeds, llm.get_input_embeddings()(ids)], dim=1)                             # (1, P + T, d)
    end = llm.config.eos_token_id
    written = llm.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=llm.device),
                           max_new_tokens=tokens, do_sample=False, pad_token_id=end if isinstance(end, int) else end[0])
    return encoder.tokenizer.hf.decode(written[0], skip_special_tokens=True).strip().split("\n")[0]


def answer(llm, distiller, encoder: Encoder, demos: list[dict], vectors: Tensor, queries: list[dict], labels: list[str],
           tokens: int, args) -> dict[str, tuple[list[str], float]]:
    """What each way answers, and its seconds: vectors; with the demonstrations at hand also nothing (zero_shot) and the
    demonstrations themselves (icl)."""
    chosen = [query | {"options": query["options"] or labels} for query in queries]
    limit = encoder.limit(demos + chosen) if demos else 0
    ways = ("zero_shot", "icl", "mend") if demos else ("mend",)
    embed, found = llm.get_input_embeddings(), {}
    for way in ways:
        started = time.time()
        if all(query["options"] for query in chosen):
            prefix = vector_prefix(llm, vectors[None], encoder.tokenizer.bos_id) if way == "mend" else \
                one_prefix(way, demos, limit, llm, distiller, encoder, args)
            answers = predict(llm, prefix, encoder, chosen, first=way == "zero_shot")
        else:
            ids = encoder.demonstrations(demos, limit) if way == "icl" else []
            prefix = vectors if way == "mend" else embed(torch.tensor(ids, dtype=torch.long, device=llm.device))
            answers = [write_answer(llm, prefix, encoder, query, tokens) for query in chosen]
        found[way] = answers, time.time() - started
    return found


def main(argv: list[str] | None = None) -> dict:
    args = get_parser().parse_args(argv)
    args.seed = 0
    asks = bool(args.ask or args.queries)
    check((bool(args.demos) != bool(args.vectors) or args.export, "give --demos FILE, or --vectors FILE in its place"),
          (asks or args.out or args.export, "nothing to do: --ask or --queries to answer, --out to keep the vectors"),
          (not (args.vectors and args.out), "--out writes the vectors of --demos; --vectors are in a file already"),
          (args.context_len >= 1, f"--context-len is {args.context_len}; give at least 1 token"))
    if args.export:
        common.export_checkpoint(args.checkpoint, Path(args.export))
        return finish({"checkpoint": common.checkpoint_id(args.export), "bytes": Path(args.export).stat().st_size})
    demos = read_lines(args.demos, ("input", "output")) if args.demos else []
    queries = [{"task": "--ask", "input": text.strip(), "output": "", "options": []} for text in args.ask]
    queries += read_lines(args.queries, ("input",)) if args.queries else []
    check((all(query["input"] for query in queries), "--ask holds an empty text"))
    device = setup(args, training=False)
    llm, distiller = load_llm(args.llm, device, common.torch_dtype(args.dtype)), None
    if args.vectors:
        vectors, about = read_vectors(args.vectors, llm)
        args.distill_len, args.template = len(vectors), about["template"]
    else:
        distiller, state = load_distiller(args.checkpoint, llm)
        distiller.eval()
        args.distill_len, args.template = state["model"]["distill_len"], state["model"]["template"]
    encoder = make_encoder(args, Tokenizer(args.llm), llm, distiller)
    if demos:
        limit = encoder.limit(demos + queries)
        kept = encoder.fitting(demos, limit)
        ids = torch.tensor([encoder.demonstrations(demos, limit)], device=device)                    # (1, T_d)
        with torch.no_grad(), common.autocast(device, args.dtype):
            vectors = distiller(ids, torch.ones_like(ids, dtype=torch.bool))[0].float()              # (l, d)
        about = {"llm": identity(llm), "checkpoint": common.checkpoint_id(args.checkpoint), "template": args.template,
                 "demonstrations": len(kept), "tokens": ids.shape[1], "labels": labels_of(demos),
                 "answer_tokens": max(len(encoder.answer(demo["output"])) for demo in demos)}
        print(f"{len(kept)} of {len(demos)} demonstrations, {ids.shape[1]} tokens, distilled into {len(vectors)} vectors")
    if args.out:
        save_vectors(args.out, vectors, about)
        print(f"written to {args.out}: {vectors.numel() * 4 / 1e3:.0f} kB")
    result = {name: about[name] for name in ("demonstrations", "tokens")} | {"vectors": len(vectors)}
    if queries:
        found = answer(llm, distiller, encoder, demos, vectors, queries, about["labels"], about["answer_tokens"], args)
        result |= show(queries, found)
    return finish(result)


def show(queries: list[dict], found: dict[str, tuple[list[str], float]]) -> dict:
    """Print the answers side by side, and the share of right ones where the queries have outputs; return both."""
    for i, query in enumerate(queries):
        if i < 20:
            said = " · ".join(f"{way} {answers[i]!r}" for way, (answers, _) in found.items())
            print(f"{query['input'][:100]!r}: {said}" + (f" · right {query['output']!r}" if query["output"] else ""))
    figures = {"answers": {way: answers for way, (answers, _) in found.items()},
               "seconds": {way: round(seconds, 3) for way, (_, seconds) in found.items()}}
    labelled = [i for i, query in enumerate(queries) if query["output"]]
    if labelled:
        right = {way: sum(answers[i] == queries[i]["output"] for i in labelled) / len(labelled) for way, (answers, _) in found.items()}
        print(f"right, of {len(labelled)}: " + " · ".join(f"{way} {share:.1%}" for way, share in right.items()))
        figures["accuracy"] = {way: round(share, 4) for way, share in right.items()}
    return figures


if __name__ == "__main__":
    run_main(main)
