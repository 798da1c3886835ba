"""What the LLM's induction heads look at, with demonstrations and with distilled vectors (Sec. 5.3, App. C).

    python -m paper.attention                                    # induction score of every head, for Fig. 8
    python -m paper.attention --tasks FOLDER --checkpoint DIR    # and where the top four look, for Fig. 5
    python -m paper.figures fig5 --results out/attention.json    # draws the latter
    python -m paper.figures fig8 --results out/induction.json    # draws the former

Writes out/induction.json and out/attention.json.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import common
from common import autocast, check, finish, parse, run_main, setup
from loading import (
    checkpoint_id,
    load_distiller,
    load_llm,
    make_formatter,
    max_positions,
    refuse_seen_tasks,
    require_input_vectors,
)
from model import causal_mask, positions_of, run_backbone, with_head
from sources.files import write_whole
from sources.headers import refuse_wrong_method, template_for
from sources.tasks import SEEDS, demonstration_set, tasks_of
from sources.text import Tokenizer

SEQUENCES, COPY_LEN = 10, 500  # the induction test: random sequences, tokens in each before doubling (App. C)
TOP, COLUMNS = 4, 20  # heads looked at; columns that demonstrations or vectors are pooled to (Sec. 5.3)


@torch.no_grad()
def attend(llm, embeds: Tensor, head: list[int], keep: Callable[[Tensor], Tensor]) -> Tensor:
    """Read one sequence, after the fixed ids of `head`; keep a part of each layer's attention weights.

    Args:
        embeds: (1, T, d). keep: takes a layer's weights, (heads, T, T) or with h ids of `head`
            (heads, h + T, h + T), destination before source, while they exist: no two layers' weights are
            held at once.
    Returns:
        (layers, ...), what `keep` returned for each layer, fp32, on the CPU.
    Raises:
        UserError where the LLM is built in another way.
    """
    embeds, mask = with_head(llm, embeds, torch.ones(embeds.shape[:2], dtype=torch.bool, device=llm.device),
                             head)
    layers = [m for m in llm.base_model.modules() if type(m).__name__.endswith("Attention")]
    check((len(layers) == llm.config.num_hidden_layers, (
        f"{type(llm).__name__} has {len(layers)} modules named ...Attention in "
        f"{llm.config.num_hidden_layers} layers; this needs a decoder-only LLM with one in each, as GPT-2, "
        "OPT and Llama have")))
    kept, implementation = [], llm.config._attn_implementation
    hooks = [m.register_forward_hook(lambda module, inputs, out: kept.append(keep(out[1][0].float()).cpu()))
             for m in layers]
    llm.set_attn_implementation("eager")  # the other implementations never hold the weights
    try:
        run_backbone(llm.base_model, embeds.to(llm.dtype), causal_mask(mask), positions_of(mask))
    finally:
        llm.set_attn_implementation(implementation)
        for hook in hooks:
            hook.remove()
    return torch.stack(kept)


def induction_score(weights: Tensor, n: int) -> Tensor:
    """Mean attention from a token of a sequence's second copy to what followed it in the first (App. C).

    score = 1/n sum_t A[t, t - n + 1] over the n destinations t of the second copy.

    Args:
        weights: (heads, 2n, 2n), or (heads, 1 + 2n, 1 + 2n) after a BOS. n: tokens in a copy.
    Returns:
        (heads,), between 0 and 1.
    """
    return weights.diagonal(offset=1 - n, dim1=-2, dim2=-1)[..., -n:].mean(dim=-1)


def induction_scores(llm, ids: Tensor, head: list[int]) -> Tensor:
    """`induction_score` of every head, averaged over the random sequences ids (N, n): (layers, heads)."""
    n = ids.shape[1]
    embeds = llm.get_input_embeddings()(ids.repeat(1, 2))                               # (N, 2n, d)
    return torch.stack([attend(llm, one[None], head, lambda w: induction_score(w, n))
                        for one in embeds]).mean(dim=0)


def max_pool(weights: np.ndarray, columns: int = COLUMNS) -> np.ndarray:
    """(rows, n) -> (rows, min(n, columns)): the largest weight in each of `columns` runs of neighbours, whose
    lengths differ by at most one."""
    parts = np.array_split(weights, min(columns, weights.shape[1]), axis=1)
    return np.stack([part.max(axis=1) for part in parts], axis=1)


def answer_attention(llm, prefix: Tensor, query_ids: list[int], heads: list[tuple[int, int]],
                     head: list[int]) -> dict[str, np.ndarray]:
    """How each of `heads`, (layer, head), attends where the first answer token is predicted: Fig. 5.

    The paper says "the first token of the output word". The query's last position is what puts it out.

    Args:
        prefix: (1, P, d), E_D for ICL or S_D for MEND.
    Returns:
        prefix: (heads, min(P, COLUMNS)), max-pooled. query: (heads, T_x). The head is left out.
    """
    query = llm.get_input_embeddings()(torch.tensor([query_ids], device=llm.device))    # (1, T_x, d)
    embeds = torch.cat([prefix.to(query.dtype), query], dim=1)                          # (1, P + T_x, d)
    last = attend(llm, embeds, head, lambda w: w[:, -1])                      # (layers, heads, h + P + T_x)
    rows = torch.stack([last[head] for head in heads])[:, -embeds.shape[1]:].numpy()
    return {"prefix": max_pool(rows[:, :prefix.shape[1]]), "query": rows[:, prefix.shape[1]:]}


def look(args: argparse.Namespace, llm, tokenizer: Tokenizer, heads: list[tuple[int, int]]) -> dict:
    """Fig. 5's record: `answer_attention` with the demonstrations of one task and with their vectors."""
    distiller, state = load_distiller(args.checkpoint, llm)
    require_input_vectors(distiller.eval(), "Fig. 5")
    args.distill_len, tasks = distiller.distill_len, tasks_of(args)
    args.template = template_for(args, state)
    task = args.task or tasks.test[0]
    check((task in tasks.test, (f"--task {task} is no meta-test task of {args.split} here; "
                                f"{common.did_you_mean(task, tasks.test)}")))
    refuse_wrong_method(["mend"], state, args.checkpoint)
    refuse_seen_tasks(state["trained_on"], tasks, [task])
    demos, files = demonstration_set(tasks, task, args.seed, args.k)
    queries, formatter = files["test"], make_formatter(args, tokenizer, llm, distiller)
    check((0 <= args.example < len(queries),
           f"--example is {args.example}; {task} has 0 to {len(queries) - 1}"))
    shown = formatter.demonstrations(demos, formatter.limit(demos + queries))
    demo_ids = torch.tensor([shown], device=llm.device)                                 # (1, T_d)
    query_ids = formatter.query(queries[args.example])
    with torch.no_grad(), autocast(llm.device, args.dtype):
        vectors = distiller(demo_ids, torch.ones_like(demo_ids, dtype=torch.bool))      # (1, l, d)
    prefixes = {"icl": llm.get_input_embeddings()(demo_ids), "mend": vectors}
    rows = {method: {part: values.round(4).tolist() for part, values in
                     answer_attention(llm, prefix, query_ids, heads, formatter.turns.head).items()}
            for method, prefix in prefixes.items()}
    return {"checkpoint": checkpoint_id(args.checkpoint), "trained_on": state["trained_on"],
            "step": state["step"],
            "task": task, "data_hash": tasks.data_hash(task, args.seed), "example": args.example, "k": args.k,
            "demo_tokens": demo_ids.shape[1], "distill_len": args.distill_len, "heads": heads,
            "query_tokens": [tokenizer.hf.decode([i]).strip() for i in query_ids], **rows}


def get_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__, "preset", "llm", "tasks", "split", "k", "template", "seed", "device",
                                "dtype", "llm-weights")
    group = parser.add_argument_group("attention")
    group.add_argument("--checkpoint", help="run folder or checkpoint file; without it, Fig. 8 only")
    group.add_argument("--task", help="meta-test task of Fig. 5; default: the first that is there")
    group.add_argument("--example", type=int, default=0, help="which of its test examples, from 0")
    group.add_argument("--context-len", type=int, default=900, help="demonstration tokens at most")
    group.add_argument("--out", default=str(common.OUT),
                       help="folder of induction.json and attention.json")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = parse(get_parser(), argv)
    check(*common.shared_rules(args), *common.at_least(args, 1, "context_len"),
          (not args.checkpoint or args.seed in SEEDS, f"--seed {args.seed}: MetaICL's are {sorted(SEEDS)}"),
          *(common.place_rule("--out", f"{args.out}/{name}.json") for name in ("induction", "attention")))
    device = setup(args, training=False)
    llm = load_llm(args.llm, device, common.torch_dtype(args.dtype), args.llm_weights)
    tokenizer = Tokenizer(args.llm)
    limit, length = max_positions(llm.config), 2 * COPY_LEN + len(tokenizer.bos)
    check((limit is None or length <= limit,
           (f"--llm {Path(args.llm).name} reads {limit} tokens, and the induction test needs {length}; "
            "take another LLM")))
    ids = torch.randint(llm.config.vocab_size, (SEQUENCES, COPY_LEN),
                        generator=torch.Generator().manual_seed(args.seed))
    scores = induction_scores(llm, ids.to(device), tokenizer.bos)                       # (layers, heads)
    top = scores.flatten().topk(min(TOP, scores.numel())).indices.tolist()
    heads = [divmod(i, scores.shape[1]) for i in top]
    folder = "$METAICL_DIR" if Path(args.tasks[0]).is_dir() else args.tasks[0]  # no machine's path
    words = [f'"{folder}"' if word == args.tasks[0] else shlex.quote(word)
             for word in (sys.argv[1:] if argv is None else argv)]
    about = {"llm": Path(args.llm).name, "seed": args.seed, "dtype": args.dtype, "commit": common.commit(),
             "command": " ".join(["python", "-m", "paper.attention", *words])}
    records = {"induction": about | {"sequences": SEQUENCES, "length": COPY_LEN, "heads": heads,
                                     "scores": [[round(s, 4) for s in row] for row in scores.tolist()]}}
    if args.checkpoint:
        records["attention"] = about | look(args, llm, tokenizer, heads)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, record in records.items():
        write_whole(Path(args.out) / f"{name}.json", json.dumps(record) + "\n")
    found = [{"layer": a, "head": b, "score": round(scores[a, b].item(), 4)} for a, b in heads]
    return finish({"heads": found,
                   "files": [str(Path(args.out) / f"{name}.json") for name in records]})


if __name__ == "__main__":
    run_main(main)
