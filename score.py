"""From states to numbers: losses, option scores, predictions, metrics.

Covers Eq. (1) to (4) of the paper: score_options, distill_loss, pred_loss and finetune_loss.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from common import autocast, check, require_finite
from data import Formatter, collate, flat, padded_left
from model import Prefix, answer_mask, demo_prefix, head_logits, query_states, vector_prefix


def sum_in_chunks(loss: Callable[..., Tensor], states: Tensor, *others: Tensor,
                  chunk: int | None = None) -> Tensor:
    """sum over rows of loss(states, *others) without ever holding logits for more than `chunk` positions
    (128; on a GPU, which small pieces of work leave idle, 1,024).

    The gradient with respect to `states` is taken chunk by chunk while the logits are there, so that they are
    made only once. It is exact, to first order.

    Args:
        loss: (n, d) and n rows of each of `others` -> scalar sum. states: (N, d).
    Returns:
        scalar, fp32, differentiable in `states`.
    """
    chunk = chunk or (128 if states.device.type == "cpu" else 1024)
    total, gradients = states.new_zeros((), dtype=torch.float32), []
    with_grad = torch.is_grad_enabled() and states.requires_grad
    for i in range(0, states.shape[0], chunk):
        part = states[i:i + chunk].detach().requires_grad_(with_grad)
        value = loss(part, *(other[i:i + chunk] for other in others))
        if with_grad:
            gradients.append(torch.autograd.grad(value, part)[0])
        total = total + value.detach()
    if not gradients:
        return total
    # adds zero to the value, and the stored gradient to the derivative
    return total + ((states - states.detach()).float() * torch.cat(gradients).float()).sum()


def distill_loss(llm: PreTrainedModel, student_states: Tensor, teacher_states: Tensor,
                 denominator: int | None = None) -> Tensor:
    """L_distill = KL(P_LLM(x | E_D) || P_LLM(x | MEND(E^_D))), Eq. (3), Sec. 3.1: forward KL, temperature 1.

    Args:
        student_states, teacher_states: (N, d), the states that predict the same N tokens with either prefix.
        denominator: tokens to average over; None = N. A step of several micro-batches or ranks passes the
            count of all its tokens: the sum of the results is then one mean over them.
    Returns:
        scalar, nats per token, fp32.
    """
    if student_states.shape != teacher_states.shape:
        raise ValueError(f"student states have shape {tuple(student_states.shape)}, teacher states "
                         f"{tuple(teacher_states.shape)}: select the same positions from both")

    def kl(student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.log_softmax(head_logits(llm, teacher), dim=1)                        # (n, V)
        log_p = F.log_softmax(head_logits(llm, student), dim=1)                             # (n, V)
        return F.kl_div(log_p, target, reduction="sum", log_target=True)

    with torch.autocast(student_states.device.type, enabled=False):
        total = sum_in_chunks(kl, student_states, teacher_states.detach())
    return total / (student_states.shape[0] if denominator is None else denominator)


def pred_loss(llm: PreTrainedModel, student_states: Tensor, target_ids: Tensor,
              denominator: int | None = None) -> Tensor:
    """L_pred = -log P_LLM(y | concat(S_D, E_x)), Eq. (4), Sec. 3.2, over answer tokens; over all of x: CLM.

    DEVIATION: Eq. (4) is printed without the minus sign and as a sum; this is the mean over tokens.

    Args:
        student_states: (N, d), the states that predict target_ids: (N,). denominator: as in distill_loss.
    Returns:
        scalar, nats per token, fp32.
    """
    def cross_entropy(student: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head_logits(llm, student), target, reduction="sum")

    with torch.autocast(student_states.device.type, enabled=False):
        total = sum_in_chunks(cross_entropy, student_states, target_ids)
    return total / (student_states.shape[0] if denominator is None else denominator)


def pretrain_loss(clm: Tensor, distill: Tensor, gamma: float) -> Tensor:
    """L = L_CLM + gamma L_distill, App. B, of the ablations; MEND's own is L_distill alone."""
    return clm + gamma * distill


def finetune_loss(pred: Tensor, distill: Tensor, lam: float, pred_weight: float = 1.0) -> Tensor:
    """L_finetune = L_pred + lambda L_distill, Eq. (4), Sec. 3.2; pred_weight 0: Table 4, without L_pred."""
    return pred_weight * pred + lam * distill


@torch.no_grad()
def score_options(llm: PreTrainedModel, prefix: Prefix, batch: dict[str, Tensor]) -> Tensor:
    """Eq. (1) and (2), Sec. 2: the log-likelihood of every answer option after its query, in one pass; its
    argmax is the label. DEVIATION: the mean over an option's tokens, as in MetaICL; the paper has their sum.

    Args:
        prefix: of demonstrations, Eq. (1), or of vectors, Eq. (2). batch: from data.collate; branch o >= 1 of
            a query holds option o - 1.
    Returns:
        (B, queries, options) fp32, nats per token; -inf where a query has fewer options.
    """
    states = query_states(llm, prefix, batch)                                               # (B, T, d)
    rows, columns = torch.nonzero(answer_mask(batch), as_tuple=True)                        # (N,)
    log_p = torch.cat([
        -F.cross_entropy(head_logits(llm, states[r, c]), batch["query_ids"][r, c], reduction="none")
        for r, c in zip(rows.split(128), columns.split(128), strict=True)])                 # (N,)
    shape = (states.shape[0], int(batch["query"].max()) + 1, int(batch["branch"].max()))
    where = (rows, batch["query"][rows, columns], batch["branch"][rows, columns] - 1)
    require_finite("the log-likelihood of an answer option", log_p)
    total = log_p.new_zeros(shape).index_put(where, log_p, accumulate=True)
    count = log_p.new_zeros(shape).index_put(where, torch.ones_like(log_p), accumulate=True)
    return (total / count.clamp(min=1)).masked_fill(count == 0, float("-inf"))


PASS_TOKENS = {"cpu": 512, "mps": 512, "cuda": 2048}  # query and option tokens scored in one pass
CONTROLS = ("mend_swapped", "mend_permuted", "mend_constant")  # MEND's vectors of other demonstrations
VECTOR_METHODS = ("prompt_tuning", "hypertuning", "mend", *CONTROLS)  # the LLM reads vectors of a checkpoint
METHODS = ("zero_shot", "majority", "icl", "icl_swapped", "icl_budget", "last_l", *VECTOR_METHODS)


def demo_tokens(method: str, demos: list[dict], limit: int, formatter: Formatter) -> list[int]:
    """What one method reads of the demonstrations. zero_shot: nothing. icl_budget: those that fit into l
    tokens, the honest baseline of equal length. icl and the methods of vectors: all that fit into `limit`
    tokens. last_l: the last l tokens of these, which is where `--vector-start residual` starts from."""
    if method == "zero_shot":
        return []
    if method in ("icl_budget", "last_l"):
        n = formatter.distill_len * len(formatter.parts(demos, limit))
        return formatter.budget(demos, n) if method == "icl_budget" else \
            formatter.demonstrations(demos, limit)[-n:]
    return formatter.demonstrations(demos, limit)


def distil(parts: list[list[tuple]], distiller, device, dtype: str, head: Sequence[int]) -> Tensor:
    """The vectors S_D, (1, S l, d), of one D in S segments (Formatter.parts), to stand after `head`."""
    ids, mask = (t.to(device) for t in padded_left(list(map(flat, parts))))                 # (S, T_s)
    with torch.no_grad(), autocast(device, dtype):
        return distiller(ids, mask, len(parts), head)


def one_prefix(method: str, demos: list[dict], limit: int, llm, distiller, formatter: Formatter,
               args) -> Prefix:
    """The prefix, B = 1, of one demonstration set, read once for all queries after it."""
    head = formatter.turns.head
    if method in VECTOR_METHODS:
        parts = formatter.parts(demos, limit)
        return vector_prefix(llm, distil(parts, distiller, llm.device, args.dtype, head), head)
    tokens = demo_tokens(method, demos, limit, formatter)
    demo_ids = torch.tensor([tokens], dtype=torch.long, device=llm.device)                  # (1, T_d)
    return demo_prefix(llm, demo_ids, torch.ones_like(demo_ids, dtype=torch.bool), head)


def passes(queries: list[tuple], device: torch.device) -> Iterator[dict]:
    """Batches of one row, PASS_TOKENS or so each, of `queries`: (x ids, [option ids, ...]), in order."""
    groups, size, most = [[]], 0, PASS_TOKENS[torch.device(device).type]
    for x, options in queries:
        tokens = len(x) + sum(map(len, options))
        if groups[-1] and size + tokens > most:
            groups, size = [*groups, []], 0
        groups[-1].append((x, options))
        size += tokens
    return (collate([{"demo": [], "queries": group}], device) for group in groups if group)


@torch.no_grad()
def option_scores(llm: PreTrainedModel, prefix: Prefix, formatter: Formatter, queries: list[dict],
                  first: bool = False) -> list[Tensor]:
    """score_options of each query after one prefix of B = 1: (options,) each, perhaps padded with -inf."""
    encoded = [formatter.scoring_query(q, first=first) for q in queries]
    needed = prefix.mask.shape[1] + max([len(x) + max(map(len, options)) for x, options in encoded] or [0])
    check((needed <= (formatter.llm_positions or needed), f"the longest query with an option, and what is "
           f"before it, take {needed} positions, and the LLM has {formatter.llm_positions}; give a smaller "
           "--distill-len, --segments or --context-len"))
    return [row for batch in passes(encoded, llm.device) for row in score_options(llm, prefix, batch)[0]]


@torch.no_grad()
def predict(llm, prefix: Prefix, formatter: Formatter, queries: list[dict], first: bool = False) -> list[str]:
    """The chosen option of each query, Eq. (1) and (2); all queries are read after one prefix of B = 1.

    first: no demonstrations or vectors stand before the queries (zero_shot).

    DEVIATION: Eq. (1) takes the labels seen among the demonstrations; MetaICL and the original code score the
    task's whole option list, and so does this.
    """
    scores = option_scores(llm, prefix, formatter, queries, first)
    return [q["options"][int(row.argmax())] for q, row in zip(queries, scores, strict=True)]


def accuracy(predictions: list[str], golds: list[str]) -> float:
    return float(np.mean([p == g for p, g in zip(predictions, golds, strict=True)]))


def macro_f1(predictions: list[str], golds: list[str]) -> float:
    """F1 averaged over the labels that occur among the gold answers, as in MetaICL."""
    scores = []
    for label in sorted(set(golds)):
        hits = sum(p == g == label for p, g in zip(predictions, golds, strict=True))
        scores.append(2 * hits / (predictions.count(label) + golds.count(label)))
    return float(np.mean(scores))


def task_metrics(predictions: list[str], golds: list[str], task_type: str) -> dict:
    """Both metrics and the headline.
    DEVIATION: the paper's text says accuracy for classification and macro-F1 otherwise; its zero-shot figures
    on classification match MetaICL's, which are macro-F1 there, accuracy otherwise. The headline follows.
    """
    f1, acc = macro_f1(predictions, golds), accuracy(predictions, golds)
    return {"macro_f1": f1, "accuracy": acc, "headline": f1 if task_type == "classification" else acc}
