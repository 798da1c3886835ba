"""The plain reference: one sequence at a time, no cache, no packing, no padding, full-vocabulary logits everywhere.

It is the oracle of the tests and what bench.py compares speeds with; it shares no code with model.py.

A row is what data.collate takes: {"demo": ids, "queries": [(x ids, [option ids, ...]), ...]}. A prefix is the tensor of
embeddings that stands before a query, (P, d) with P >= 1: E_D for the teacher, S_D for the student, after a BOS where
there is one. Lists of prefixes go with lists of rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence


def plain_embeds(llm: nn.Module, ids: list[int]) -> Tensor:
    """The LLM's token embeddings: T ids -> (T, d)."""
    return llm.get_input_embeddings()(torch.tensor(ids, dtype=torch.long, device=llm.device))


def plain_vectors(distiller: nn.Module, demo_ids: list[int]) -> Tensor:
    """S_D, Sec. 3: the distiller's last l final states behind [E_D ; placeholders], at the LLM's width -> (l, d)."""
    ids = torch.tensor(demo_ids, dtype=torch.long, device=distiller.placeholders.device)
    embeds = torch.cat([distiller.embed(ids).float(), distiller.placeholders])                       # (T_d + l, d_s)
    states = distiller.backbone(inputs_embeds=embeds[None]).last_hidden_state[0]                     # (T_d + l, d_s)
    vectors = distiller.project(states[-len(distiller.placeholders):])                               # (l, d)
    return vectors if distiller.gain is None else distiller.gain * vectors


def plain_output(llm: nn.Module, prefix: Tensor, query_ids: list[int]):
    """One full forward over [prefix ; E_x ; E_y], head included; hidden states are kept."""
    embeds = torch.cat([prefix.to(llm.dtype), plain_embeds(llm, query_ids)])                         # (P + T, d)
    return llm(inputs_embeds=embeds[None], use_cache=False, output_hidden_states=True)


def plain_logits(llm: nn.Module, prefix: Tensor, query_ids: list[int]) -> Tensor:
    """(T, V) fp32: the logits that predict each of the T query tokens, the first one from the last of the prefix."""
    if len(prefix) == 0:
        raise ValueError("the prefix is empty: nothing predicts the first query token")
    logits = plain_output(llm, prefix, query_ids).logits[0].float()                                  # (P + T, V)
    return logits[len(prefix) - 1:-1]


def plain_answer_logits(llm: nn.Module, prefix: Tensor, x: list[int], y: list[int]) -> Tensor:
    """(T_y, V) fp32: the logits that predict y behind [prefix ; E_x], for either kind of LLM. One of them not empty."""
    if not llm.config.is_encoder_decoder:
        return plain_logits(llm, prefix, x + y)[len(x):]
    embeds = torch.cat([prefix.to(llm.dtype), plain_embeds(llm, x)])                                 # (P + T_x, d)
    decoder_ids = torch.tensor([[llm.config.decoder_start_token_id, *y[:-1]]], device=llm.device)
    return llm(inputs_embeds=embeds[None], decoder_input_ids=decoder_ids, use_cache=False).logits[0].float()


def plain_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher || student) of each position: two (T, V) -> (T,)."""
    return kl_divergence(Categorical(logits=teacher_logits), Categorical(logits=student_logits))


def plain_distill_loss(llm: nn.Module, rows: list[dict], students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """Eq. (3), Sec. 3.1: KL(teacher || student), mean over all tokens of x and y (of y alone where
    the LLM is an encoder-decoder). At most one answer a query."""
    def log_p(prefix: Tensor, x: list[int], y: list[int]) -> Tensor:
        if llm.config.is_encoder_decoder:  # it predicts no token of x
            return plain_answer_logits(llm, prefix, x, y)
        return plain_logits(llm, prefix, x + y)

    divergences = []
    for row, student, teacher in zip(rows, students, teachers, strict=True):
        for x, answers in row["queries"]:
            y = [token for answer in answers for token in answer]
            with torch.no_grad():
                target = log_p(teacher, x, y)                                                        # (T, V)
            divergences.append(plain_kl(target, log_p(student, x, y)))                               # (T,)
    return torch.cat(divergences).mean()


def plain_pred_loss(llm: nn.Module, rows: list[dict], students: list[Tensor]) -> Tensor:
    """Eq. (4), Sec. 3.2, first term: -log P(y | x), mean over all answer tokens. One answer a query."""
    losses = []
    for row, student in zip(rows, students, strict=True):
        for x, (y,) in row["queries"]:
            logits = plain_answer_logits(llm, student, x, y)                                         # (T_y, V)
            losses.append(F.cross_entropy(logits, torch.tensor(y, device=logits.device), reduction="none"))
    return torch.cat(losses).mean()


def plain_finetune_loss(llm: nn.Module, demo_ids: list[int], student: Tensor, query: tuple, lam: float = 1.0) -> Tensor:
    """Eq. (4), Sec. 3.2, for one query (x ids, [y ids]): L_pred + lambda L_distill, from one pass of either reader."""
    x, (y,) = query
    with torch.no_grad():
        target = plain_logits(llm, plain_embeds(llm, demo_ids), x + y)                               # (T, V)
    logits = plain_logits(llm, student, x + y)                                                       # (T, V)
    pred = F.cross_entropy(logits[len(x):], torch.tensor(y, device=logits.device))
    return pred + lam * plain_kl(target, logits).mean()


@torch.no_grad()
def plain_score_options(llm: nn.Module, rows: list[dict], prefixes: list[Tensor]) -> list[list[list[float]]]:
    """Eq. (1) and (2), Sec. 2: mean log-likelihood of each option, as [row][query][option]; re-reads all for each."""
    def score(prefix: Tensor, x: list[int], option: list[int]) -> float:
        log_p = plain_answer_logits(llm, prefix, x, option).log_softmax(dim=1)                       # (T_y, V)
        return log_p[range(len(option)), option].mean().item()

    return [[[score(prefix, x, option) for option in options] for x, options in row["queries"]]
            for row, prefix in zip(rows, prefixes, strict=True)]
