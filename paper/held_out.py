"""What training looks at between its steps: held-out text and the tasks' dev examples, in full precision.

    python -m paper.held_out --checkpoint DIR --corpus FOLDER --distill-len 32       # the text, on its own
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import common
from common import check, finish, gather, is_main, parse, run_main, setup, sum_over_ranks
from data import Corpus, Formatter, collate, even
from loading import checkpoint_id, load_all
from model import answer_mask, demo_prefix, loss_mask, query_states, teacher_and_student
from score import distill_loss, one_prefix, option_scores, passes, pred_loss, task_metrics
from sources.shard import shares
from sources.tasks import SEEDS, Tasks, demonstration_set, require_options


@contextlib.contextmanager
def full_precision(llm: PreTrainedModel) -> Iterator[None]:
    """The frozen LLM in fp32 inside, and each tensor as it was after it: a KL in bf16 has a floor of 0.0015
    nats. Weights in 8 bit stay, and so do those of a sharded LLM, or of one that a GPU does not hold so."""
    keep = getattr(llm, "is_loaded_in_8bit", False) or getattr(llm, "is_sharded", False) or not fits(llm)
    tensors = [] if keep else [*llm.parameters(), *llm.buffers()]
    dtypes = [t.dtype for t in tensors]
    try:
        for t in tensors:
            t.data = t.data.float() if t.is_floating_point() else t.data
        yield
    finally:
        for t, dtype in zip(tensors, dtypes, strict=True):
            t.data = t.data.to(dtype)


def fits(llm: PreTrainedModel) -> bool:
    """Whether every rank's GPU holds the LLM in fp32; settled once, so that all evaluations are alike."""
    if not hasattr(llm, "fits_in_fp32"):
        more = sum(t.numel() * (4 - t.element_size()) for t in [*llm.parameters(), *llm.buffers()]
                   if t.is_floating_point())  # bytes
        llm.fits_in_fp32 = all(gather([more <= free_bytes(llm.device)]))
        if not llm.fits_in_fp32 and is_main():
            print(f"note: evaluated in {llm.dtype}: the LLM in fp32 takes {more / 1e9:.1f} GB more, which "
                  "are not free; a KL below 0.0015 nats says nothing then")
    return llm.fits_in_fp32


def free_bytes(device: torch.device) -> float:
    """What a GPU has left for tensors, a tenth kept back; no bound elsewhere."""
    if device.type != "cuda":
        return float("inf")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 0.9 * (torch.cuda.mem_get_info(device)[0] + unused)


def bar(steps: Sequence, what: str, unit: str) -> tqdm:
    """A progress bar that goes away: the first evaluation takes minutes, before the first step is made."""
    return tqdm(steps, desc=what, unit=unit, leave=False, disable=not is_main())


@torch.no_grad()
def dev_metrics(llm, distiller, tasks: Tasks, formatter: Formatter, args, device: torch.device) -> dict:
    """Both terms of Eq. (4), choice and headline on the meta-test tasks' dev examples, tasks shared out over
    the ranks; the distiller in fp32, the LLM as it is (see `full_precision`).

    DEVIATION: the paper names the dev data that select a checkpoint, not the quantity. Here it is
    dev_option_ce, what evaluation looks at in a form that moves smoothly: the cross-entropy of the right
    option under a softmax over the scores of a query's options.

    Returns:
        dev_option_ce (nats a query, mean over each task's queries, then over tasks), dev_pred (nats per
        answer token), dev_kl and dev_clm (negative log-likelihood; nats per token), dev_headline.
    """
    rank, ranks = shares(llm)
    seed = args.seed if args.seed in SEEDS else SEEDS[0]
    sums = dict.fromkeys(("pred", "answers", "kl", "clm", "tokens", "headline", "option_ce", "tasks"), 0.0)
    exact = argparse.Namespace(dtype="fp32")
    distiller.eval()
    n = min(args.eval_tasks or len(tasks.test), len(tasks.test))
    names = [tasks.test[i] for i in even(len(tasks.test), n)[:-1]]
    for task in bar(names[rank::ranks], "dev examples", "task"):
        demos, files = demonstration_set(tasks, task, seed, args.k)
        queries = files["dev"][:args.eval_queries]
        require_options(queries, formatter.answer)
        limit = formatter.limit(demos + queries)
        teacher_prefix = one_prefix("icl", demos, limit, llm, distiller, formatter, exact)
        student_prefix = one_prefix("mend", demos, limit, llm, distiller, formatter, exact)
        for batch in passes([formatter.training_query(q) for q in queries], device):
            student = query_states(llm, student_prefix, batch)                              # (1, T, d)
            teacher = query_states(llm, teacher_prefix, batch)                              # (1, T, d)
            mask, answers = loss_mask(llm, batch), answer_mask(batch)
            sums["kl"] += distill_loss(llm, student[mask], teacher[mask], 1).item()
            sums["pred"] += pred_loss(llm, student[answers], batch["query_ids"][answers], 1).item()
            sums["clm"] += pred_loss(llm, student[mask], batch["query_ids"][mask], 1).item()
            sums["tokens"] += int(mask.sum())
            sums["answers"] += int(answers.sum())
        scores = option_scores(llm, student_prefix, formatter, queries)
        chosen = [q["options"][int(row.argmax())] for q, row in zip(queries, scores, strict=True)]
        golds = [q["output"] for q in queries]
        sums["headline"] += task_metrics(chosen, golds, tasks.types[task])["headline"]
        sums["option_ce"] += float(np.mean(option_ces(queries, scores)))
        sums["tasks"] += 1
    distiller.train()
    totals = sum_over_ranks(list(sums.values()), device) if ranks > 1 else sums.values()
    pred, answers, kl, clm, tokens, headline, option_ce, n_tasks = totals
    return {"dev_option_ce": option_ce / n_tasks, "dev_pred": pred / answers, "dev_kl": kl / tokens,
            "dev_clm": clm / tokens, "dev_headline": headline / n_tasks}


def option_ces(queries: list[dict], scores: list[torch.Tensor]) -> list[float]:
    """Cross-entropy of each query's right option, in nats, under a softmax over `score.option_scores`."""
    return [-row.log_softmax(dim=0)[q["options"].index(q["output"])].item()
            for q, row in zip(queries, scores, strict=True)]


@torch.no_grad()
def evaluate_kl(llm, distiller, corpus: Corpus, args, device: torch.device, bos: list[int]) -> dict:
    """Held-out KL(full D || what stands in its place), nats per token, for the vectors and for two
    references; the distiller in fp32.

    The first token of x is left out of all: without context nothing predicts it. Ranks share the windows.
    """
    rank, ranks = shares(llm)
    sums = dict.fromkeys(("tokens", "vectors", "no_context", "last_l"), 0.0)
    documents = corpus.held_out[:args.eval_docs][rank::ranks]
    distiller.eval()
    for i in bar(range(0, len(documents), args.batch_size), "held-out text", "batch"):
        batch = collate([corpus.row(d, args.beta) for d in documents[i:i + args.batch_size]], device)
        mask = loss_mask(llm, batch) & (batch["position"] > 0)
        demo_ids, demo_mask, last = batch["demo_ids"], batch["demo_mask"], slice(-args.distill_len, None)
        teacher, student = teacher_and_student(llm, distiller, batch, bos, "fp32")
        no_context = demo_prefix(llm, demo_ids[:, :0], demo_mask[:, :0], bos)
        last_l = demo_prefix(llm, demo_ids[:, last], demo_mask[:, last], bos)
        states = {"vectors": student, "no_context": query_states(llm, no_context, batch),
                  "last_l": query_states(llm, last_l, batch)}
        sums["tokens"] += int(mask.sum())
        for name, found in states.items():
            sums[name] += distill_loss(llm, found[mask], teacher[mask], 1).item()
    distiller.train()
    tokens, *kl = sum_over_ranks(list(sums.values()), device) if ranks > 1 else sums.values()
    vectors, no_context, last_l = (value / tokens for value in kl)
    return {"heldout_kl": vectors, "heldout_kl_no_context": no_context, "heldout_kl_last_l": last_l,
            "recovered": 1 - vectors / no_context if no_context else 0.0}


def get_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__, "preset", "llm", "distill-len", "corpus", "device")
    group = parser.add_argument_group("held-out text")
    group.add_argument("--checkpoint", required=True, help="run folder or checkpoint file")
    group.add_argument("--window", type=int, default=256, help="tokens taken from each document")
    group.add_argument("--beta", type=float, default=0.8, help="share of a window that is D; the rest is x")
    group.add_argument("--min-doc-len", type=int, default=64, help="shortest document to use, in tokens")
    group.add_argument("--eval-docs", type=int, default=64, help="windows")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = parse(get_parser(), argv)
    check(*common.shared_rules(args), *common.at_least(args, 8, "window", "min_doc_len"),
          *common.at_least(args, 1, "eval_docs"), (0 < args.beta < 1, f"--beta is {args.beta}; give a share"))
    vars(args).update(dtype="fp32", template="space", context_len=args.window, batch_size=8)
    device = setup(args, training=False)
    llm, distiller, _, formatter = load_all(args, device)
    demo, most, own = round(args.beta * args.window), formatter.llm_positions, formatter.distiller_positions
    reads = len(formatter.tokenizer.bos) + max(args.window, args.window - demo + args.distill_len)
    check((most is None or reads <= most,
           f"--window {args.window} makes {reads} tokens, and the LLM reads at most {most}; give less"),
          (own is None or demo + args.distill_len <= own,
           f"--beta {args.beta} of --window {args.window} makes {demo + args.distill_len} tokens, and the "
           f"distiller reads at most {own}; give less"))
    corpus = Corpus(args.corpus, formatter.tokenizer, args.window, args.min_doc_len)
    metrics = evaluate_kl(llm, distiller, corpus, args, device, formatter.tokenizer.bos)
    return finish({"corpus": corpus.name, "hash": corpus.hash,
                   "windows": len(corpus.held_out[:args.eval_docs]), "distill_len": args.distill_len,
                   "checkpoint": checkpoint_id(args.checkpoint), **metrics})


if __name__ == "__main__":
    run_main(main)
