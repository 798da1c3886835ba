"""How fast training and scoring are, against the plain reference, plain.py: `python bench.py --suite`.

The step is that of train_finetune.py, Eq. (4), and the scoring that of evaluate.py.
"""

import argparse
import functools
import itertools
import os
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

import plain
from common import UserError, autocast, check, torch_dtype
from data import Formatter, collate, sample_row, step_rows
from loading import make_formatter
from model import Prefix, answer_mask, demo_prefix, loss_mask, query_states, vector_prefix
from paper.measure import (
    PAIRS,
    Count,
    build_random,
    in_child,
    interleaved,
    load,
    peak_in_child,
    with_flags,
)
from score import distill_loss, finetune_loss, one_prefix, passes, pred_loss, score_options
from sources.tasks import Tasks, load_tasks
from sources.text import Tokenizer

SQUARE = 4096  # width of the matrices whose product gives the machine's rate

# --------------------------------------------------------------------------------------------------
# Training


def counted_positions(llm, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Indices into the batch's flattened (B * T) columns: of the tokens of `loss_mask`, and of answer
    tokens."""
    mask, answers = loss_mask(llm, batch), answer_mask(batch)
    return mask.flatten().nonzero()[:, 0], answers.flatten().nonzero()[:, 0]


def training_step(llm, distiller, batch: dict[str, Tensor], where: tuple[Tensor, Tensor], dtype: str,
                  read: Callable[[Prefix], Tensor] | None = None) -> Tensor:
    """Forward and backward of Eq. (4) as in train_finetune.py, the gradient left in the distiller; returns
    the loss.

    where: `counted_positions` of the batch. read: prefix -> (B, T, d) stands in for `query_states`.
    """
    tokens, answers = where
    read = read or functools.partial(query_states, llm, batch=batch)
    with torch.no_grad():
        teacher = read(demo_prefix(llm, batch["demo_ids"], batch["demo_mask"])).flatten(0, 1)  # (B * T, d)
    with autocast(llm.device, dtype):
        vectors = distiller(batch["demo_ids"], batch["demo_mask"])                      # (B, l, d)
    student = read(vector_prefix(llm, vectors)).flatten(0, 1)                           # (B * T, d)
    loss = finetune_loss(pred_loss(llm, student[answers], batch["query_ids"].flatten()[answers]),
                         distill_loss(llm, student[tokens], teacher[tokens]), 1.0)
    loss.backward()
    return loss.detach()


def plain_step(llm, distiller: nn.Module, rows: list[dict], dtype: str) -> None:
    """The same samples the plain way: each query with a demonstration set of its own, full logits, nothing
    shared."""
    queries = [(row["demo"], query) for row in rows for query in row["queries"]]
    for demo, (x, (y,)) in queries:
        with autocast(llm.device, dtype):
            vectors = plain.Distiller.forward(distiller, demo)                          # (l, d)
        teacher, student = plain.teacher_and_student(llm, demo, vectors.float(), x, y)
        loss = plain.finetune_loss(plain.pred_loss(student[-len(y):], y),
                                   plain.distill_loss(student, teacher), 1.0)
        (loss / len(queries)).backward()


def training_speed(llm, distiller: nn.Module, rows: list[dict], dtype: str, repeats: int) -> dict:
    """Query tokens a second of a step over `rows`, ours and plain, and ours as a share of the matrix-product
    rate."""
    device, batch = llm.device, collate(rows, llm.device)
    where = counted_positions(llm, batch)
    square = torch.randn(SQUARE, SQUARE, device=device, dtype=torch_dtype(dtype))
    distiller.train()

    def step(run: Callable) -> Callable:
        return lambda: (run(), distiller.zero_grad(set_to_none=True))

    with Count() as count:
        step(lambda: training_step(llm, distiller, batch, where, dtype))()
    times = interleaved({"matmul": lambda: square @ square,
                         "ours": step(lambda: training_step(llm, distiller, batch, where, dtype)),
                         "matmul again": lambda: square @ square,
                         "plain": step(lambda: plain_step(llm, distiller, rows, dtype))}, repeats, device)
    rates = [2 * SQUARE ** 3 * 2 / (a + b)
             for a, b in zip(times["matmul"], times["matmul again"], strict=True)]
    tokens = int(batch["query_mask"].sum())
    seconds = {name: statistics.median(times[name]) for name in ("ours", "plain")}
    return {"dtype": dtype, "sets": len(rows), "queries_per_demo": len(rows[0]["queries"]),
            "query_tokens": tokens,
            "demo_tokens": int(batch["demo_mask"].sum()), "distill_len": distiller.distill_len,
            "seconds": seconds, "tokens_per_second": {name: tokens / s for name, s in seconds.items()},
            "ratio": statistics.median(p / o for p, o in zip(times["plain"], times["ours"], strict=True)),
            "flops": count.flops, "matmul_flops_per_second": statistics.median(rates),
            "share": statistics.median(count.flops / t / rate
                                       for t, rate in zip(times["ours"], rates, strict=True)),
            "times": times}


def require_training_tasks(tasks: Tasks, k: int, queries: int) -> None:
    """Raise UserError where `typical_rows` could draw none; before anything is timed."""
    check((bool(tasks.train), f"--tasks {tasks.folder} has no meta-training tasks of {tasks.split}, and a "
                              "training step is timed on some; give another --tasks or --split"),
          *((tasks.size(t) >= k + queries, f"task {t} has {tasks.size(t)} different examples, and --k {k} "
             f"with {queries} queries needs {k + queries}; give a lower --k") for t in tasks.train))


def typical_rows(tasks: Tasks, formatter: Formatter, seed: int, k: int, sets: int,
                 queries: int) -> list[dict]:
    """The rows of that one of the first 64 training steps whose size is the median."""
    rows_of = step_rows(lambda first, count: [sample_row(tasks, formatter, seed, i, k, queries)
                                              for i in range(first, first + count)], seed, sets)
    steps = sorted((rows_of(step) for step in range(64)),
                   key=lambda rows: sum(len(row["demo"]) for row in rows))
    return steps[32]


def padding(tasks: Tasks, formatter: Formatter, seed: int, k: int, queries: int, batch_size: int = 8) -> dict:
    """Share of padding in the batches of 64 steps, by length as in training, and as the samples are drawn."""
    def draw(first: int, count: int) -> list[dict]:
        return [sample_row(tasks, formatter, seed, i, k, queries) for i in range(first, first + count)]

    def share(batches) -> float:
        masks = [batch[name] for batch in map(collate, batches) for name in ("demo_mask", "query_mask")]
        return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    rows_of, rows = step_rows(draw, seed, batch_size), draw(0, 64 * batch_size)
    return {"by_length": share(rows_of(step) for step in range(64)),
            "as_drawn": share(rows[i:i + batch_size] for i in range(0, len(rows), batch_size))}


# --------------------------------------------------------------------------------------------------
# The loss's memory


class Head(nn.Module):
    """What the losses need of an LLM: its output head, tied to nothing."""

    def __init__(self, width: int, vocab: int):
        super().__init__()
        self.head = nn.Linear(width, vocab, bias=False).requires_grad_(False)
        self.config, self.dtype = None, torch.float32

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def prepare_loss(kind: str, tokens: int, width: int, vocab: int) -> Callable[[], Tensor]:
    """Eq. (3) over `tokens` positions and its gradient with respect to the student's states, chunked or
    plain."""
    torch.manual_seed(0)
    llm = Head(width, vocab)
    teacher = torch.randn(tokens, width)
    student = (teacher + torch.randn(tokens, width)).requires_grad_()

    def run() -> Tensor:
        loss = distill_loss(llm, student, teacher) if kind == "chunked" else \
            plain.distill_loss(llm.head(student), llm.head(teacher))
        loss.backward()
        return student.grad

    return run


def loss_memory(tokens: int = 1024, width: int = 1280, vocab: int = 50257) -> dict:
    """Peak memory of the loss in processes of their own, and how far the two gradients are apart,
    relative."""
    found = {kind: peak_in_child(prepare_loss, kind, tokens, width, vocab) for kind in ("plain", "chunked")}
    gradients = {kind: f.pop("result") for kind, f in found.items()}
    difference = (gradients["plain"] - gradients["chunked"]).norm() / gradients["plain"].norm()
    return {"tokens": tokens, "vocab": vocab, "bytes": {kind: f["above_bytes"] for kind, f in found.items()},
            "ratio": found["plain"]["above_bytes"] / found["chunked"]["above_bytes"],
            "gradient_difference": difference.item()}


# --------------------------------------------------------------------------------------------------
# Scoring


def scoring_task(tasks: Tasks, seed: int, n: int, options: int) -> tuple[str, dict]:
    """The first meta-test task with at least n test queries that all have so many options; its files."""
    for task in tasks.test:
        files = tasks.files(task, seed)
        if len(files["test"]) >= n and all(len(q["options"]) == options for q in files["test"][:n]):
            return task, files
    raise UserError(f"no meta-test task of {tasks.split} in {tasks.folder} has {n} test queries of {options} "
                    "options; give another --split or --tasks")


@torch.no_grad()
def cached_scores(method: str, demos: list[dict], limit: int, queries: list, llm, distiller: nn.Module,
                  formatter: Formatter, args: argparse.Namespace) -> list[Tensor]:
    """evaluate.py's scores, (options,) for each query: what stands before them is read once."""
    prefix = one_prefix(method, demos, limit, llm, distiller, formatter, args)
    return [scores for batch in passes(queries, llm.device)
            for scores in score_options(llm, prefix, batch)[0]]


@torch.no_grad()
def scoring_speed(llm, distiller, tasks: Tasks, formatter: Formatter, args, n: int = 400, n_plain: int = 4,
                  options: int = 4, repeats: int = 3) -> dict:
    """Seconds for one (task, seed) of n queries: evaluate.py's way and re-reading everything per option.

    The plain way is timed on n_plain queries and taken n / n_plain times. In it MEND distils for every
    option, as the prompt is read anew for each. Scores of the same queries must agree.
    """
    task, files = scoring_task(tasks, args.seed, n, options)
    demos, queries = files["train"][:args.k], [formatter.scoring_query(q) for q in files["test"][:n]]
    limit = formatter.limit(demos + files["test"])
    demo, some = formatter.demonstrations(demos, limit), queries[::n // n_plain][:n_plain]
    distiller.eval()

    def fast(method: str, queries: list) -> list[Tensor]:
        return cached_scores(method, demos, limit, queries, llm, distiller, formatter, args)

    def plainly(method: str) -> list[list[float]]:
        scores = []
        for x, answers in some:
            scores.append([])
            for option in answers:
                prefix = (plain.embed(llm, demo) if method == "icl" else
                          plain.Distiller.forward(distiller, demo))
                scores[-1] += plain.score_options(llm, prefix, x, [option]).tolist()
        return scores

    found = {"task": task, "queries": n, "demo_tokens": len(demo), "plain_queries": n_plain}
    for method in ("icl", "mend"):
        both = [(a, b) for scores, expected in zip(fast(method, some), plainly(method), strict=True)
                for a, b in zip(scores.tolist(), expected, strict=True)]
        ways = {"plain": functools.partial(plainly, method),
                "cached": functools.partial(fast, method, queries)}
        times = interleaved(ways, repeats, llm.device, warm_up=False)
        plain_seconds, cached = (statistics.median(times[name]) for name in ("plain", "cached"))
        seconds = {"plain": plain_seconds * n / n_plain, "cached": cached}
        found[method] = {"seconds": seconds, "ratio": seconds["plain"] / cached, "times": times,
                         "score_difference": max(abs(a - b) for a, b in both)}
    return found


# --------------------------------------------------------------------------------------------------
# Threads


def time_steps(load: Callable, args: tuple, threads: int, repeats: int) -> float:
    """In a child: median seconds of a step with so many threads. load(*args) gives llm, distiller, rows and
    dtype."""
    torch.set_num_threads(threads)
    llm, distiller, rows, dtype = load(*args)
    batch = collate(rows, llm.device)
    where = counted_positions(llm, batch)
    distiller.train()
    times = interleaved({"step": lambda: training_step(llm, distiller, batch, where, dtype)}, repeats,
                        llm.device)
    return statistics.median(times["step"])


def thread_settings(load: Callable, *args, repeats: int = 3) -> list[dict]:
    """Seconds of a training step under the thread settings that matter on a CPU, each in its own process."""
    found = []
    for threads, spin in itertools.product(sorted({1, os.cpu_count() or 1}), ("100", "")):
        seconds = in_child({"GOMP_SPINCOUNT": spin}, time_steps, load, args, threads, repeats)
        found.append({"threads": threads, "GOMP_SPINCOUNT": spin or "unset", "seconds": seconds})
    return found


# --------------------------------------------------------------------------------------------------
# The suite


def load_step(args: argparse.Namespace, dtype: str, random_llm: str | None = None):
    """LLM, distiller, the rows of a typical step (2 sets, Q = 4) and dtype; random_llm: of that architecture
    with random weights and l = 100, and one row."""
    tasks = load_tasks(args.tasks, args.split, args.llm, args.k)
    if random_llm is None:
        llm, distiller = load(with_flags(args, dtype=dtype), torch.device(args.device))
    else:
        llm, distiller = build_random(random_llm, PAIRS[random_llm], 100, torch_dtype(dtype), args.device)
    formatter = make_formatter(with_flags(args, distill_len=distiller.distill_len), Tokenizer(args.llm), llm,
                           distiller)
    rows = typical_rows(tasks, formatter, args.seed, args.k, 2, 4)
    return llm, distiller, rows if random_llm is None else rows[:1], dtype


def suite(args: argparse.Namespace, device: torch.device, methods: dict[str, dict]) -> dict:
    """Every ratio of the speed claims, with both figures. methods: LLM -> `bench.counted` at 900 tokens."""
    args.device, args.context_len, args.dtype = str(device), 900, "fp32"
    results, lines, ratios, tasks = {}, [], {}, load_tasks(args.tasks, args.split, args.llm, args.k)
    require_training_tasks(tasks, args.k, 4)

    def line(name: str, value: float, goal: float, what: str) -> None:
        ratios[name] = value
        lines.append({"name": name, "value": value, "goal": goal, "met": value >= goal, "figures": what})
        print(f"{name:46s}{value:8.2f}  (goal {goal:g}{'' if value >= goal else ', MISSED'})  {what}",
              flush=True)

    for (name, rows), goal in zip(methods.items(), (3.5, 4.0), strict=True):
        results[f"methods_{name}"] = rows
        icl, mend = rows["icl"]["query_flops"], rows["mend"]["query_flops"]
        line(f"flops_icl_over_mend_{name.replace('-', '_')}", icl / mend, goal,
             f"{icl / 1e9:.0f} against {mend / 1e9:.0f} GFLOP: {1 - mend / icl:.0%} fewer")
    r = results["loss_memory"] = loss_memory()
    line("loss_memory_plain_over_chunked", r["ratio"], 4,
         f"{r['bytes']['chunked'] / 1e6:.0f} against {r['bytes']['plain'] / 1e6:.0f} MB for "
         f"{r['tokens']:,} tokens, gradients {r['gradient_difference']:.0e} apart")
    llm, distiller = load(args, device)
    formatter = make_formatter(args, Tokenizer(args.llm), llm, distiller)
    r = results["padding"] = padding(tasks, formatter, args.seed, args.k, 1)
    line("padding_as_drawn_over_by_length", r["as_drawn"] / r["by_length"], r["as_drawn"] / 0.1,
         f"{r['as_drawn']:.1%} against {r['by_length']:.1%} of a batch of 8")
    r = results["scoring"] = scoring_speed(llm, distiller, tasks, formatter, args, repeats=args.repeats)
    for m in ("icl", "mend"):
        s = r[m]["seconds"]
        line(f"scoring_cached_over_plain_{m}", r[m]["ratio"], 10,
             f"{s['cached']:.1f} against {s['plain']:.0f} s for {r['queries']} queries of {r['task']} with "
             f"{r['demo_tokens']} demonstration tokens, scores at most {r[m]['score_difference']:.0e} apart")
    ratios["scoring_cached_over_plain"] = min(ratios[f"scoring_cached_over_plain_{m}"]
                                              for m in ("icl", "mend"))
    del llm, distiller
    shares = 0.4 if device.type == "cuda" else 0.7
    for label, dtype in itertools.product(("smollm2", "gpt2_large"), ("fp32", "bf16")):
        r = training_speed(*load_step(args, dtype, {"gpt2_large": "gpt2-large"}.get(label)), args.repeats)
        results[f"training_{label}_{dtype}"], t = r, r["tokens_per_second"]
        line(f"training_q4_over_plain_{label}_{dtype}", r["ratio"], 2.5,
             f"{t['ours']:.1f} against {t['plain']:.1f} query tokens/s")
        line(f"training_share_of_matmul_rate_{label}_{dtype}", r["share"], shares,
             f"{r['flops'] / r['seconds']['ours'] / 1e9:.0f} of "
             f"{r['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s")
    ratios["training_q4_over_plain"] = ratios["training_q4_over_plain_smollm2_fp32"]
    ratios["training_share_of_matmul_rate"] = ratios["training_share_of_matmul_rate_gpt2_large_fp32"]
    if device.type == "cpu":
        results["threads"] = thread_settings(load_step, args, "fp32")
        for t in results["threads"]:
            print(f"step, {t['threads']} threads, GOMP_SPINCOUNT {t['GOMP_SPINCOUNT']}: {t['seconds']:.1f} s")
    return {"ratios": ratios, "lines": lines, "details": results}


def markdown(results: dict) -> str:
    """The table of results/SPEED.md."""
    rows = ["| what | ratio | goal | figures |", "|---|---|---|---|"]
    for r in results["lines"]:
        goal = f"{r['goal']:.2f}{'' if r['met'] else ', missed'}"
        rows.append(f"| {r['name'].replace('_', ' ')} | {r['value']:.2f} | {goal} | {r['figures']} |")
    return "\n".join(rows)
