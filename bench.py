"""What the methods cost at inference (Fig. 3), what training needs, and how fast this code is.

    python bench.py --demo-tokens 847 --query-tokens 56         # the seven methods on this machine
    python bench.py --preset paper --random-init --all-logits   # the same for gpt2-large
    python bench.py --preset paper --fig3                       # Fig. 3 and scaling, counted without weights
    python bench.py --preset paper --plan                       # which card a training step fits, hours
    python bench.py --preset paper --plan --llm Qwen/Qwen3-0.6B # the same for an LLM of yours
    python bench.py --suite --tasks FOLDER                      # against the plain way: every ratio
    python bench.py --peers --tasks FOLDER                      # against lm_eval's scoring, peft's training

Covers Fig. 3 and the inference efficiency paragraph of Sec. 4. Counting needs no weights: tensors without
data go through the same code. A query is always read with batch size 1; MEND's cost includes distilling.
"""

import argparse
import functools
import itertools
import json
import platform
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

import common
from common import autocast, check, finish, parse, run_main, setup
from loading import max_positions, require_input_vectors
from model import (
    causal_mask,
    demo_prefix,
    head_logits,
    positions_of,
    query_states,
    run_backbone,
    vector_prefix,
)
from paper import peers, plan, speed
from paper.measure import (
    CONFIGS,
    PAIRS,
    Count,
    build_random,
    interleaved,
    load,
    no_weights,
    peak_in_child,
    weight_bytes,
    with_flags,
)
from sources.files import write_whole

CONTEXTS = {"class_to_class": 469, "hr_to_lr": 652, "qa_to_qa": 639, "non_nli_to_nli": 848,
            "non_para_to_para": 818}
QUERY = 56                          # tokens of a query with its answer: Sec. 4.1, Class->Class
SCALING = {"demo_tokens": (16, 32, 64, 100, 128, 192, 256, 384, 512, 768, 1024, 1536),
           "distill_len": (1, 10, 25, 50, 100, 200, 400)}
METHODS = ("zero_shot", "icl", "icl_cached", "prompt_tuning", "mend", "mend_vectors", "mend_kv")

# --------------------------------------------------------------------------------------------------
# The seven methods


def methods(llm, distiller, demo_ids: Tensor, query_ids: Tensor, dtype: str,
            all_logits: bool) -> dict[str, tuple]:
    """name -> (prepare, read): prepare() gives what is kept of a demonstration set, read(kept) logits.

    zero_shot reads the query alone, icl the demonstrations with it, icl_cached after their stored keys and
    values, prompt_tuning after l trained vectors; mend distils for the query, mend_vectors keeps the
    vectors, mend_kv their keys and values in the LLM.

    Args:
        demo_ids: (1, T_d). query_ids: (1, T). all_logits: logits at every position that is read, as the
            original code makes them; else at the last one, (1, V).
    """
    ones = torch.ones_like
    demo_mask = ones(demo_ids, dtype=torch.bool)
    column = torch.arange(query_ids.shape[1], device=query_ids.device)[None]
    batch = {"query_ids": query_ids, "query_mask": ones(query_ids, dtype=torch.bool), "position": column,
             "query": torch.zeros_like(query_ids), "branch": torch.zeros_like(query_ids),
             "predictor": column + 1}
    embed = llm.get_input_embeddings()

    def logits(states: Tensor) -> Tensor:
        return head_logits(llm, states[0] if all_logits else states[0, -1:])

    def read(*parts: Tensor) -> Tensor:
        embeds = torch.cat([*parts, embed(query_ids)], dim=1)                           # (1, P + T, d)
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        out = run_backbone(llm.base_model, embeds, causal_mask(mask), positions_of(mask))
        return logits(out.last_hidden_state)

    def read_after(prefix) -> Tensor:
        return logits(query_states(llm, prefix, batch))

    def distil() -> Tensor:
        with autocast(llm.device, dtype):
            return distiller(demo_ids, demo_mask).to(llm.dtype)                         # (1, l, d)

    def nothing() -> None:
        return None

    return {"zero_shot": (nothing, lambda _: read()),
            "icl": (lambda: demo_ids, lambda ids: read(embed(ids))),
            "icl_cached": (lambda: demo_prefix(llm, demo_ids, demo_mask), read_after),
            "prompt_tuning": (lambda: embed(demo_ids[:, :1]).expand(-1, distiller.distill_len, -1), read),
            "mend": (lambda: demo_ids, lambda _: read(distil())),
            "mend_vectors": (distil, read),
            "mend_kv": (lambda: vector_prefix(llm, distil()), read_after)}


def kept_bytes(kept) -> int:
    """Storage for a demonstration set: token ids in 4 bytes each, vectors, or keys and values."""
    if kept is None:
        return 0
    if isinstance(kept, Tensor):
        return kept.numel() * (4 if kept.dim() == 2 else kept.element_size())
    return sum(t.numel() * t.element_size() for pair in kept.keys_values for t in pair)


@torch.no_grad()
def count_methods(llm, distiller, demo_tokens: int, query_tokens: int, dtype: str, all_logits: bool,
                  names=METHODS) -> dict[str, dict]:
    """FLOPs to prepare and a query, memory (weights, what is kept, what else is alive at once), storage."""
    ids = torch.zeros(1, demo_tokens + query_tokens, dtype=torch.long, device=llm.device)
    made, found = methods(llm, distiller, ids[:, :demo_tokens], ids[:, demo_tokens:], dtype, all_logits), {}
    for name, (prepare, read) in made.items():
        if name in names:
            with Count() as once:
                kept = prepare()
            with Count() as query:
                read(kept)
            stored = kept_bytes(kept)
            weights = weight_bytes(llm, *([distiller] if name == "mend" else []))
            found[name] = {"prepare_flops": once.flops, "query_flops": query.flops, "stored_bytes": stored,
                           "peak_bytes": weights + stored + query.peak}
    return found


def pays_off_after(prepare: int, query: int, other_prepare: int, other_query: int) -> float | None:
    """Queries after which preparing more and reading less is the cheaper in all; 0 at once, None never."""
    if prepare <= other_prepare and query <= other_query:
        return 0.0
    return (prepare - other_prepare) / (other_query - query) if query < other_query else None


def pay_off(rows: dict[str, dict]) -> dict:
    """Queries of one set after which distilling it once is cheaper than ICL without and with a cache."""
    def after(ours: str, theirs: str) -> float | None:
        return pays_off_after(*(rows[name][f] for name in (ours, theirs)
                                for f in ("prepare_flops", "query_flops")))

    return {f"{ours} against {theirs}": after(ours, theirs)
            for ours in ("mend_vectors", "mend_kv") for theirs in ("icl", "icl_cached")}


# --------------------------------------------------------------------------------------------------
# Fig. 3 and scaling, counted


def counted(llm_name: str, demo_tokens: int, query_tokens: int, distill_len: int, all_logits: bool,
            names=METHODS) -> dict[str, dict]:
    """count_methods for one of the paper's LLMs in 16 bit, without weights."""
    with no_weights():
        llm, distiller = build_random(llm_name, PAIRS[llm_name], distill_len, torch.bfloat16)
        return count_methods(llm, distiller, demo_tokens, query_tokens, "bf16", all_logits, names)


def fig3(args: argparse.Namespace, device: torch.device) -> dict:
    """Fig. 3: the seven methods at the paper's context lengths for its LLMs, logits at every position as
    there; with --repeats above 0 --llm also runs here, with random weights."""
    settings, ratios = [], {}
    for name in PAIRS:
        for split, demo_tokens in CONTEXTS.items():
            rows = counted(name, demo_tokens, args.query_tokens, args.distill_len, True)
            settings.append({"llm": name, "split": split, "demo_tokens": demo_tokens, "rows": rows,
                             "pay_off": pay_off(rows)})
            ratios.setdefault(name, []).append(rows["icl"]["query_flops"] / rows["mend"]["query_flops"])
    for name, values in ratios.items():
        print(f"{name:10s} ICL over MEND, FLOPs:",
              *(f"{s} {v:.2f}" for s, v in zip(CONTEXTS, values, strict=True)))
    measured, args.all_logits, args.random_init = [], True, True
    if args.repeats:
        llm, distiller = load(args, device)
        measured = [here(with_flags(args, demo_tokens=n), llm, distiller) for n in CONTEXTS.values()]
    return {"query_tokens": args.query_tokens, "distill_len": args.distill_len, "settings": settings,
            "measured": measured, "icl_over_mend_flops": ratios,
            "icl_over_mend_seconds": [m["rows"]["icl"]["seconds"] / m["rows"]["mend"]["seconds"]
                                      for m in measured],
            "scaling": [scaling(name, args.query_tokens, args.distill_len) for name in PAIRS]}


def scaling(name: str, query_tokens: int, distill_len: int) -> dict:
    """A query's FLOPs against T_d, up to what both models read, and l at T_d = 900; few logits."""
    names = [n for n in METHODS if n != "zero_shot"]
    config, distiller = (AutoConfig.for_model(**CONFIGS[n]) for n in (name, PAIRS[name]))
    longest = min(max_positions(config) - query_tokens, max_positions(distiller) - distill_len)
    by_demo = [n for n in SCALING["demo_tokens"] if n < longest] + [longest]
    by_l = [n for n in SCALING["distill_len"] if 900 + n <= max_positions(distiller)]
    found = {"llm": name}
    for axis, xs, settings in (("demo_tokens", by_demo, [(n, distill_len) for n in by_demo]),
                               ("distill_len", by_l, [(900, n) for n in by_l])):
        points = [counted(name, T_d, query_tokens, n, False, names) for T_d, n in settings]
        flops = {n: [rows[n]["query_flops"] for rows in points] for n in names}
        crossings = {f"{a} and {b}": at for a, b in itertools.combinations(names, 2)
                     if (at := crossing(xs, flops[a], flops[b])) is not None}
        found[axis] = {"x": xs, "flops": flops, "crossings": crossings}
    return found


def crossing(x: list[float], a: list[float], b: list[float]) -> float | None:
    """Where curves a and b over x first change places, on straight lines between points; None if nowhere."""
    gaps = [p - q for p, q in zip(a, b, strict=True)]
    for (x0, d0), (x1, d1) in itertools.pairwise(zip(x, gaps, strict=True)):
        if d0 * d1 < 0 or (d1 == 0 and d0 != 0):
            return x0 + (x1 - x0) * d0 / (d0 - d1)
    return None


# --------------------------------------------------------------------------------------------------
# The seven methods on this machine


def prepare_method(args: argparse.Namespace, demo_tokens: int, name: str) -> Callable[[], None]:
    """For a child process: build the models and what a method keeps; returns its query as a function."""
    llm, distiller = load(args, torch.device("cpu"))
    prepare, read = real_methods(args, llm, distiller, demo_tokens)[name]
    with torch.no_grad():
        kept = prepare()

    @torch.no_grad()
    def query() -> None:
        read(kept)

    return query


def real_methods(args: argparse.Namespace, llm, distiller, demo_tokens: int) -> dict[str, tuple]:
    generator = torch.Generator().manual_seed(args.seed)
    shape = (1, demo_tokens + args.query_tokens)
    ids = torch.randint(0, llm.config.vocab_size, shape, generator=generator).to(llm.device)
    return methods(llm, distiller, ids[:, :demo_tokens], ids[:, demo_tokens:], args.dtype, args.all_logits)


@torch.no_grad()
def here(args: argparse.Namespace, llm, distiller) -> dict:
    """The table of the seven methods on this machine: FLOPs, seconds a query, peak memory, storage."""
    require_input_vectors(distiller, "bench.py")
    check((distiller.backbone is not None, "bench.py times the distiller, and free vectors have none; give "
           "another --distiller or --checkpoint (prompt_tuning's row is timed with any)"))
    limits = (max_positions(llm.config), max_positions(distiller.backbone.config))
    device, longest = llm.device, min((limit for limit in limits if limit is not None), default=sys.maxsize)
    check((not llm.config.is_encoder_decoder,
           f"--llm {args.llm} is an encoder-decoder, which keeps no keys and values; only --plan takes it"),
          (args.demo_tokens + max(args.query_tokens, distiller.distill_len) <= longest,
           (f"--demo-tokens {args.demo_tokens} with a query or {distiller.distill_len} placeholders passes "
            f"the {longest} tokens that the models read; give less")))
    rows = count_methods(llm, distiller, args.demo_tokens, args.query_tokens, args.dtype, args.all_logits)
    made = real_methods(args, llm, distiller, args.demo_tokens)
    queries = {}
    for name, (prepare, read) in made.items():
        queries[name] = functools.partial(read, prepare())
    times = interleaved(queries, args.repeats, device)
    for name in METHODS:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            queries[name]()
            rows[name]["measured_peak_bytes"] = torch.cuda.max_memory_allocated()
        elif args.memory:
            peak = peak_in_child(prepare_method, args, args.demo_tokens, name)["peak_bytes"]
            rows[name]["measured_peak_bytes"] = peak
        spread = sorted(times[name])
        rows[name] |= {"seconds": statistics.median(spread), "seconds_range": [spread[0], spread[-1]]}
    print(f"{'':14s}{'GFLOP a query':>15s}{'ms a query':>12s}{'range':>18s}"
          f"{'peak MB':>10s}{'stored kB':>11s}")
    for name, r in rows.items():
        low, high = (1e3 * s for s in r["seconds_range"])
        peak = r.get("measured_peak_bytes", r["peak_bytes"])
        print(f"{name:14s}{r['query_flops'] / 1e9:15.2f}{1e3 * r['seconds']:12.1f}"
              f"{f'{low:.1f} to {high:.1f}':>18s}{peak / 1e6:10.0f}{r['stored_bytes'] / 1e3:11.1f}")
    return {"llm": Path(args.llm).name, "distiller": args.distiller, "random_init": args.random_init,
            "dtype": args.dtype, "demo_tokens": args.demo_tokens, "query_tokens": args.query_tokens,
            "distill_len": distiller.distill_len, "all_logits": args.all_logits, "rows": rows,
            "pay_off": pay_off(rows)}


# --------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")  # of Linux
    names = re.findall(r"model name\s*: (.*)", about.read_text() if about.exists() else "")
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def get_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__, "preset", "llm", "distiller", "distill-len", "tasks", "split", "k",
                                "template", "seed", "device", "dtype")
    group = parser.add_argument_group("what to measure; default: the seven methods on this machine")
    group = group.add_mutually_exclusive_group()
    group.add_argument("--fig3", action="store_true",
                       help="Fig. 3 and scaling, counted, and measured for --llm where --repeats is above 0")
    group.add_argument("--plan", action="store_true", help="memory, FLOPs and hours of training steps: of "
                       "the paper's LLMs and two others, or of --llm where that is given")
    group.add_argument("--suite", action="store_true", help="every stated ratio, against plain.py")
    group.add_argument("--peers", action="store_true", help="scoring against lm-evaluation-harness, a step "
                       "of PromptTuning against peft, on the same queries")
    group = parser.add_argument_group("measuring")
    group.add_argument("--random-init", action="store_true", help="random weights, of the same speed")
    group.add_argument("--checkpoint", help="run folder or checkpoint file; default: an untrained distiller")
    group.add_argument("--demo-tokens", type=int, default=900, help="tokens of the demonstrations")
    group.add_argument("--query-tokens", type=int, default=QUERY, help="tokens of the query with its answer")
    group.add_argument("--all-logits", action="store_true", help="logits at every position that is read")
    group.add_argument("--memory", action="store_true", help="on a CPU, measure peak memory, in processes")
    group.add_argument("--repeats", type=int, default=3, help="timed runs; with --fig3 0 = only count")
    group.add_argument("--out", default="",
                       help="results file; default: bench.json, fig3.json or peers.json of out/")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = parse(get_parser(), argv)
    check(*common.shared_rules(args),
          *common.at_least(args, 1, "demo_tokens"), *common.at_least(args, 5, "query_tokens"),
          *common.at_least(args, 0 if args.fig3 else 1, "repeats"),
          common.place_rule("--out", args.out),
          (not args.random_init or not args.checkpoint, "--random-init and --checkpoint exclude each other"),
          (not args.random_init or not args.peers, "--peers compares scores, and --random-init has none"))
    device = setup(args, training=False)
    mode = next((m for m in ("fig3", "plan", "suite", "peers") if getattr(args, m)), "here")
    if mode == "suite":
        rows = {name: counted(name, 900, QUERY, 100, True) for name in ("gpt2-large", "gpt2-xl")}
        results = speed.suite(args, device, rows)
        print(speed.markdown(results))
    elif mode == "peers":
        results = peers.suite(args, device)
    elif mode == "plan":
        results = {"plan": plan.plan(args)} | (
            {"sharded": plan.plan_sharded(args)} if "llm" in args.filled_in else {})
    elif mode == "fig3":
        results = fig3(args, device)
    else:
        results = here(args, *load(args, device))
    results = {"command": " ".join(["python", "bench.py", *(sys.argv[1:] if argv is None else argv)]),
               "commit": common.commit(), "date": common.today(), "machine": machine(device),
               "torch": torch.__version__, **results}
    default = {"suite": "bench.json", "fig3": "fig3.json", "peers": "peers.json"}.get(mode)
    if out := args.out or (default and common.OUT / default):
        write_whole(out, json.dumps(results, indent=1) + "\n")
    long = ("details", "lines", "settings", "scaling", "measured")  # only in the file
    return finish({name: value for name, value in results.items() if name not in long})


if __name__ == "__main__":
    run_main(main)
