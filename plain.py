"""MEND on one page: a small model distils demonstrations into l vectors that a frozen LLM reads instead.

    python plain.py        # nothing to download or to set; about a minute on one CPU core

One sequence at a time, without cache, packing or padding. model.py, score.py and the stages compute the same,
only faster, and are tested against it. Covers Sec. 2 (Eq. 1, 2), 3 (the distiller), 3.1 (Eq. 3), 3.2 (Eq. 4).

Legend: D, x, y lists of token ids: demonstrations, query, answer, T_d, T_x, T_y long · N tokens of a loss
        E_D token embeddings of D · S_D its distilled vectors · prefix: the P embeddings before x, E_D or S_D
        K demonstrations in D · l distillation length · d LLM width · d_s distiller width · V vocabulary
"""

import itertools
import json
import random
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

Ids = list[int]  # the tokens of one sequence

# ------------------------------------------------------------------------------------------------- The method


def embed(llm: PreTrainedModel, ids: Ids) -> Tensor:
    """The LLM's token embeddings E: T ids -> (T, d)."""
    return llm.get_input_embeddings()(torch.tensor(ids, dtype=torch.long, device=llm.device))


def read(llm: PreTrainedModel, prefix: Tensor, x: Ids, y: Ids) -> Tensor:
    """The LLM reads [prefix ; E_x ; E_y]: the logits that predict each token of x and y, (T_x + T_y, V).

    Where the prefix is empty nothing predicts x's first token: one row fewer. An encoder-decoder (T5) encodes
    [prefix ; E_x] and predicts y alone: (T_y, V). So y's rows are the last T_y, whatever the LLM.
    """
    if llm.config.is_encoder_decoder:
        embeds = torch.cat([prefix.to(llm.dtype), embed(llm, x)])                        # (P + T_x, d)
        shifted = torch.tensor([[llm.config.decoder_start_token_id, *y[:-1]]], device=llm.device)  # (1, T_y)
        return llm(inputs_embeds=embeds[None], decoder_input_ids=shifted, use_cache=False).logits[0].float()
    embeds = torch.cat([prefix.to(llm.dtype), embed(llm, x + y)])                        # (P + T_x + T_y, d)
    logits = llm(inputs_embeds=embeds[None], use_cache=False).logits[0].float()          # (P + T_x + T_y, V)
    return logits[max(len(prefix), 1) - 1:-1]  # each token is predicted at the place before it


@torch.no_grad()
def score_options(llm: PreTrainedModel, prefix: Tensor, x: Ids, options: list[Ids]) -> Tensor:
    """log P_LLM(c | concat(prefix, E_x)) of each option c -> (options,). Its argmax is the answer: Eq. (1) in
    Sec. 2 where the prefix is E_D, Eq. (2) where it is S_D. DEVIATION: a token's mean, as in MetaICL."""
    return torch.stack([-pred_loss(read(llm, prefix, x, c)[-len(c):], c) for c in options])


class Distiller(nn.Module):
    """S_D = MEND(concat(E^_D, E^_phi))[-l:], Sec. 3: l trained placeholders phi follow the demonstrations;
    their final states, at the LLM's width and scale, are the vectors. Starts from a sibling of the LLM."""

    def __init__(self, sibling: PreTrainedModel, llm: PreTrainedModel, distill_len: int):
        super().__init__()
        self.backbone, self.embed = sibling.base_model, sibling.get_input_embeddings()
        V, d_s, d = sibling.config.vocab_size, sibling.config.hidden_size, llm.config.hidden_size
        self.placeholders = nn.Parameter(self.embed(torch.randint(V, (distill_len,))).detach())  # (l, d_s)
        self.project = nn.Identity() if d_s == d else nn.Sequential(nn.Linear(d_s, d), nn.Tanh())
        # DEVIATION: a learned scalar starts S_D at the scale of the LLM's embeddings, which learns faster.
        self.gain = nn.Parameter(torch.ones(()))
        with torch.no_grad():
            self.gain.fill_(embed(llm, list(range(V))).std() / self(list(range(V))).std())

    def forward(self, D: Ids) -> Tensor:
        """T_d token ids -> S_D, (l, d)."""
        ids = torch.tensor(D, dtype=torch.long, device=self.placeholders.device)
        embeds = torch.cat([self.embed(ids).float(), self.placeholders])                 # (T_d + l, d_s)
        states = self.backbone(inputs_embeds=embeds[None]).last_hidden_state[0]          # (T_d + l, d_s)
        S_D = self.project(states[-len(self.placeholders):])                             # (l, d)
        return S_D if self.gain is None else self.gain * S_D  # None: --vector-start plain, in the tests


def teacher_and_student(llm: PreTrainedModel, D: Ids, S_D: Tensor, x: Ids, y: Ids) -> tuple[Tensor, Tensor]:
    """The logits that predict x and y, of the LLM after E_D and of the same LLM after S_D, as in `read`."""
    with torch.no_grad():
        teacher = read(llm, embed(llm, D), x, y)
    return teacher, read(llm, S_D, x, y)  # the LLM is frozen, but the gradient flows through it to S_D


def distill_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_distill = KL(P_LLM(x | E_D) || P_LLM(x | S_D)), Eq. (3), Sec. 3.1: logits, (N, V) -> mean over N."""
    return kl_divergence(Categorical(logits=teacher), Categorical(logits=student)).mean()


def pred_loss(student: Tensor, y: Ids) -> Tensor:
    """L_pred = -log P_LLM(y | concat(S_D, E_x)), Eq. (4), Sec. 3.2: (T_y, V) logits -> mean over T_y."""
    # DEVIATION: the paper prints it without the minus sign and as a sum.
    return F.cross_entropy(student, torch.tensor(y, device=student.device))


def finetune_loss(pred: Tensor, distill: Tensor, lam: float) -> Tensor:
    """L_finetune = L_pred + lambda L_distill, Eq. (4), Sec. 3.2."""
    return pred + lam * distill


# ------------------------------------------------------------------------------------------------ A toy world
# A task is a rule: it gives each of four signs one of its labels, and only demonstrations tell which. Each
# query is a filler and a sign, its answer a label; D reads "cold river happy small bread odd ...".

FILLERS = ["cold", "small", "slow", "past", "green", "while", "rain", "law"]
LABELS = {"river": ["happy", "sad", "calm", "wild"], "bread": ["odd", "even", "prime", "large"],
          "music": ["left", "right", "up", "down"], "winter": ["red", "blue", "white", "black"]}
WORDS = [*FILLERS, *LABELS, *itertools.chain(*LABELS.values())]
ID = {word: i for i, word in enumerate(WORDS)}  # the whole tokenizer
RULES = random.Random(0).sample(list(itertools.product(*LABELS.values())), 4 ** 4)
UNSEEN, SEEN = RULES[:40], RULES[40:]  # all training, of the LLM too, is on SEEN
K, L, BETA, LAMBDA = 12, 4, 0.75, 1.0  # L is l: 36 tokens become 4 vectors


def examples(rng: random.Random, rule: tuple[str, ...], n: int) -> list[tuple[Ids, Ids]]:
    """n pairs (x, y) of a task, n a multiple of four: each sign n / 4 times, in random order."""
    drawn = rng.sample([*zip(LABELS, rule, strict=True)] * (n // 4), n)
    return [([ID[rng.choice(FILLERS)], ID[sign]], [ID[label]]) for sign, label in drawn]


def concat(pairs: list[tuple[Ids, Ids]]) -> Ids:
    """D = concat(x_1, y_1, ..., x_K, y_K), Sec. 2."""
    return [token for x, y in pairs for token in x + y]


# --------------------------------------------------------------------------------------------------- Training


def learn(what: str, trained: nn.Module, sample_loss: Callable[[], Tensor], steps: int, B: int, lr: float):
    """AdamW over B samples a step, one after the other; all are equally long, so a mean of means is right."""
    optimizer, start = torch.optim.AdamW(trained.parameters()), time.time()
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr * min(step / (0.1 * steps), 1 - (step - 1) / steps)
        mean = 0.0
        for _ in range(B):
            loss = sample_loss() / B
            loss.backward()
            mean += loss.item()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 5) == 0:
            spent = time.time() - start
            print(f"{what:<27} step {step:>3} of {steps}   loss {mean:5.3f}   {spent:3.0f} s, "
                  f"{spent / step * (steps - step):3.0f} s to go", flush=True)


def pretrain_sample(llm: PreTrainedModel, distiller: Distiller, rng: random.Random) -> Tensor:
    """Stage 1, Sec. 3.2: the first beta of a text (the paper's: C4) is D, the rest x; Eq. (3) over x."""
    text = concat(examples(rng, rng.choice(SEEN), K + 4))
    D, x = text[:round(BETA * len(text))], text[round(BETA * len(text)):]
    teacher, student = teacher_and_student(llm, D, distiller(D), x, [])
    return distill_loss(student, teacher)


def finetune_sample(llm: PreTrainedModel, distiller: Distiller, rng: random.Random) -> Tensor:
    """Stage 2, Sec. 3.2: K pairs of a task are D, one more is the query x and its answer y; Eq. (4)."""
    rule = rng.choice(SEEN)
    D, (x, y) = concat(examples(rng, rule, K)), examples(rng, rule, 4)[0]
    teacher, student = teacher_and_student(llm, D, distiller(D), x, y)
    return finetune_loss(pred_loss(student[-len(y):], y), distill_loss(student, teacher), LAMBDA)


def taught(name: str, n_layer: int, width: int, rng: random.Random, steps: int) -> PreTrainedModel:
    """Not MEND: a GPT-2 taught to predict demonstrations, which stands for a pretrained language model."""
    llm = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(WORDS), n_layer=n_layer, n_head=4, n_embd=width, n_positions=64, initializer_range=0.1,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None))

    def next_token_loss() -> Tensor:
        ids = torch.tensor([concat(examples(rng, rng.choice(SEEN), K + 4)) for _ in range(32)])  # (32, T)
        return F.cross_entropy(llm(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    learn(f"teaching {name}", llm, next_token_loss, steps, B=1, lr=3e-3)
    return llm


@torch.no_grad()
def evaluate(llm: PreTrainedModel, distiller: Distiller, rng: random.Random, n_tasks: int) -> dict:
    """Accuracy of each prefix on unseen tasks, a query for each sign; options are the sign's labels."""
    demonstrations, right = [concat(examples(rng, rule, K)) for rule in UNSEEN[:n_tasks]], {}
    for i, D in enumerate(demonstrations):
        prefixes = {"zero_shot": embed(llm, []), "icl": embed(llm, D), "truncation": embed(llm, D[-L:]),
                    "mend": distiller(D), "swapped": distiller(demonstrations[i - 1])}
        for (x, y), (name, prefix) in itertools.product(examples(rng, UNSEEN[i], 4), prefixes.items()):
            options = [[ID[label]] for label in LABELS[WORDS[x[-1]]]]
            answer = options[int(score_options(llm, prefix, x, options).argmax())]
            right.setdefault(name, []).append(answer == y)
    return {name: sum(found) / len(found) for name, found in right.items()}


def main(teach_steps=100, pretrain_steps=200, finetune_steps=100, n_tasks=40) -> dict[str, float]:
    """Teaches an LLM, trains MEND on it in two stages, prints and returns its accuracy on unseen tasks."""
    torch.set_num_threads(1)  # a second thread waits more than it works on models this small
    torch.manual_seed(0)
    rng, start = random.Random(1), time.time()
    print("a task:", *[WORDS[i] for i in concat(examples(random.Random(0), SEEN[0], K))])
    llm = taught("the LLM", 2, 64, rng, teach_steps).eval().requires_grad_(False)
    distiller = Distiller(taught("its sibling", 1, 32, rng, 2 * teach_steps), llm, L)
    stage_1, stage_2 = (partial(sample, llm, distiller, rng) for sample in (pretrain_sample, finetune_sample))
    learn("MEND, stage 1, Eq. (3)", distiller, stage_1, pretrain_steps, B=8, lr=5e-3)
    learn("MEND, stage 2, Eq. (4)", distiller, stage_2, finetune_steps, B=8, lr=5e-3)

    figures = evaluate(llm, distiller, rng, n_tasks) | {"seconds": round(time.time() - start, 1)}
    print(f"\non {n_tasks} tasks never trained on: query after     accuracy")
    reads = {"zero_shot": "nothing", "icl": f"D, {3 * K} tokens", "truncation": f"the last {L} tokens of D",
             "mend": f"{L} vectors of D", "swapped": f"{L} vectors of another D"}
    for name, prefix in reads.items():
        print(f"{name:<12}{prefix:<34}{figures[name]:8.3f}")
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
