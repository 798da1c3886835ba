"""What people would use instead, on the same model, tokens and machine: `python bench.py --peers`.

Scoring options after demonstrations, against lm-evaluation-harness (EleutherAI), whose backend for
transformers' models reads context and option anew for each option; and a training step of PromptTuning
(Sec. 4.1), against peft's (Hugging Face), which reads its prompt anew for each query. Both are extras:
requirements-extra.txt.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from common import UserError, check
from data import Formatter, collate, flat
from loading import make_formatter
from model import answer_mask, query_states, vector_prefix
from paper.measure import interleaved, load, with_flags
from paper.speed import cached_scores, require_training_tasks, scoring_task, typical_rows
from score import pred_loss
from sources.tasks import Tasks, load_tasks
from sources.text import Tokenizer
from variants import FreeVectors

EXTRA = "{} is not installed here; python -m pip install -r requirements-extra.txt"


def harness(llm, tokenizer, batch_size: int) -> Callable[[list[tuple[list[int], list[int]]]], list[float]]:
    """(context ids, continuation ids) of each pair -> sum of the continuation's log-likelihoods in nats, by
    the harness."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(EXTRA.format("lm_eval")) from error
    lm = HFLM(pretrained=llm, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False)

    def score(pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        requests = [((str(i), ""), context, y) for i, (context, y) in enumerate(pairs)]
        return [value for value, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]

    return score


def scoring(llm, tasks: Tasks, formatter: Formatter, args: argparse.Namespace, n: int = 64, options: int = 4,
            batch_size: int = 8) -> dict:
    """Seconds to score n queries of one task after its K demonstrations, and how far the scores are apart
    (mean nats a token)."""
    task, files = scoring_task(tasks, args.seed, n, options)
    demos, queries = files["train"][:args.k], [formatter.scoring_query(q) for q in files["test"][:n]]
    limit = formatter.limit(demos + files["test"])
    before = [*formatter.turns.head, *flat(formatter.pieces(demos, limit))]
    pairs = [(before + x, y) for x, ys in queries for y in ys]
    theirs = harness(llm, formatter.tokenizer.hf, batch_size)
    found: dict[str, list[float]] = {}

    def ours() -> None:
        scores = cached_scores("icl", demos, limit, queries, llm, None, formatter, args)
        found["ours"] = [s for row in scores for s in row.tolist()]

    times = interleaved({"ours": ours, "harness": lambda: found.update(harness=theirs(pairs))}, args.repeats,
                        llm.device, warm_up=False)
    gaps = [abs(a - b / len(y)) for a, b, (_, y) in zip(found["ours"], found["harness"], pairs, strict=True)]
    return {"task": task, "queries": n, "demonstrations": len(demos), "demo_tokens": len(before),
            "batch_size": batch_size, "score_difference": max(gaps)} | compared(times, "ours", "harness")


def prompt_steps(llm, rows: list[dict], distill_len: int, head: list[int],
                 seed: int = 0) -> dict[str, Callable[[], tuple]]:
    """Two steps of PromptTuning on the same queries from the same l vectors, ours and peft's: each gives the
    loss and the gradient of the vectors, (l, d).

    head: ids after which ours has its vectors; peft has its own before them.
    """
    try:
        from peft import PromptTuningConfig, TaskType, get_peft_model
    except ImportError as error:
        raise UserError(EXTRA.format("peft")) from error
    free = FreeVectors(llm.get_input_embeddings(), llm.config.vocab_size, distill_len, seed).to(llm.device)
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=distill_len)
    peft = get_peft_model(llm, config)
    prompt = peft.prompt_encoder["default"].embedding.weight
    prompt.data = free.vectors.detach().to(prompt.dtype).clone()
    batch = collate(rows, llm.device)
    answers = answer_mask(batch)
    pairs = [([*head, *x], y) for row in rows for x, (y,) in row["queries"]]
    width = max(len(x + y) for x, y in pairs)
    padded = torch.tensor([[*x, *y, *[0] * (width - len(x + y))] for x, y in pairs], device=llm.device)
    labels = torch.tensor([[*[-100] * len(x), *y, *[-100] * (width - len(x + y))] for x, y in pairs],
                          device=llm.device)
    mask = torch.arange(width, device=llm.device) < torch.tensor([[len(x + y)] for x, y in pairs],
                                                                 device=llm.device)

    def with_gradient(parameter: Tensor, loss: Tensor) -> tuple[float, Tensor]:
        loss.backward()
        gradient, parameter.grad = parameter.grad, None
        return loss.item(), gradient.float()

    def ours() -> tuple[float, Tensor]:
        prefix = vector_prefix(llm, free(batch["demo_ids"], batch["demo_mask"]), head)
        states = query_states(llm, prefix, batch)[answers]
        return with_gradient(free.vectors, pred_loss(llm, states, batch["query_ids"][answers]))

    def theirs() -> tuple[float, Tensor]:
        return with_gradient(prompt, peft(input_ids=padded, attention_mask=mask.long(), labels=labels).loss)

    return {"ours": ours, "peft": theirs}


def prompt_tuning(llm, tasks: Tasks, formatter: Formatter, args: argparse.Namespace, sets: int,
                  queries: int) -> dict:
    """Seconds of a training step of `sets` times `queries`, how far losses and gradients are apart."""
    rows = typical_rows(tasks, formatter, args.seed, args.k, sets, queries)
    steps = prompt_steps(llm, rows, args.distill_len, formatter.turns.head)
    (loss, gradient), (other, their) = steps["ours"](), steps["peft"]()
    times = interleaved(steps, args.repeats, llm.device)
    return {"sets": sets, "queries_per_set": queries, "distill_len": args.distill_len,
            "query_tokens": sum(len(x + y) for row in rows for x, (y,) in row["queries"]),
            "loss_difference": abs(loss - other),
            "gradient_difference": ((gradient - their).norm() / their.norm()).item()} | \
        compared(times, "ours", "peft")


def compared(times: dict[str, list[float]], ours: str, theirs: str) -> dict:
    """Median seconds, and the median of the runs' own ratios."""
    return {"seconds": {name: statistics.median(each) for name, each in times.items()}, "times": times,
            "ratio": statistics.median(b / a for a, b in zip(times[ours], times[theirs], strict=True))}


def suite(args: argparse.Namespace, device: torch.device) -> dict:
    """Both comparisons; prints a line each."""
    args = with_flags(args, device=str(device), context_len=900)
    tasks = load_tasks(args.tasks, args.split, args.llm, args.k)
    require_training_tasks(tasks, args.k, 4)
    llm = load(with_flags(args, distiller="free"), device)[0]
    check((not llm.config.is_encoder_decoder, f"--llm {args.llm} is an encoder-decoder; --peers takes none"))
    formatter = make_formatter(args, Tokenizer(args.llm), llm, None)
    found = {"scoring": scoring(llm, tasks, formatter, args)}
    r = found["scoring"]
    s = r["seconds"]
    print(f"scoring {r['queries']} queries of {r['task']} after {r['demo_tokens']} tokens: {s['ours']:.1f} "
          f"against {s['harness']:.1f} s by lm_eval, {r['ratio']:.1f} times; scores at most "
          f"{r['score_difference']:.0e} apart")
    for name, sets, queries in (("prompt_tuning_q4", 2, 4), ("prompt_tuning_q1", 8, 1)):
        r = found[name] = prompt_tuning(llm, tasks, formatter, args, sets, queries)
        s = r["seconds"]
        print(f"PromptTuning, {sets} x {queries} queries, l = {args.distill_len}: {s['ours']:.2f} s a step "
              f"against {s['peft']:.2f} s by peft, {r['ratio']:.2f} times; "
              f"losses {r['loss_difference']:.0e}, gradients {r['gradient_difference']:.0e} apart")
    return {"ratios": {name: r["ratio"] for name, r in found.items()}, "details": found}
