"""Answers in writing after one stored prefix: many queries at once, cached, greedy or sampled, as a stream.

    writer = Writer.load("vectors.safetensors", llm, tokenizer)    # docs/serving.md; reads the vectors once
    writer.write(["sing", "wash"])                                 # ["she sings", "she washes"]

A query's answer is the one that it has alone, without a cache. Queries of a batch differ in length; masks,
positions and windows are model.py's, which count no padding. Caches and the sampling's filters are those of
transformers, whose own generate() counts padding in a sliding window, draws a batch's samples from one
source of random numbers, and streams a single row. In bf16 a batch rounds otherwise than a row alone: tokens
that are as good as equally likely may change places.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.modeling_outputs import BaseModelOutput

from common import check, require_finite
from data import Formatter, padded_left
from loading import max_positions
from model import Prefix, causal_mask, head_logits, positions_of, run_backbone, vector_prefix
from serving.vectors import asked, read_vectors
from sources.headers import check_llm_config
from sources.text import Tokenizer


class Rows:
    """Queries after one prefix, read by a decoder-only LLM; `logits`, (B, V) fp32, are of the next tokens.

    queries: B lists of ids, none empty. prefix: of B = 1; its keys and values are copied for each.
    """

    def __init__(self, llm: PreTrainedModel, prefix: Prefix, queries: Sequence[list[int]]):
        self.llm, self.mask = llm, prefix.mask.expand(len(queries), -1)                     # (B, P)
        self.cache = prefix.cache() or DynamicCache()
        if prefix.keys_values:
            self.cache.batch_repeat_interleave(len(queries))
        self.logits = self.read(*(t.to(llm.device) for t in padded_left(queries)))

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read (B, T) ids after all before them; padding, on the left, is where mask is False."""
        before = self.mask[:, None, None, :].expand(-1, -1, ids.shape[1], -1)               # (B, 1, T, P)
        allowed = torch.cat([before, causal_mask(mask)], dim=3)                             # (B, 1, T, P + T)
        positions = positions_of(mask) + self.mask.sum(dim=1, keepdim=True)                 # (B, T)
        embeds = self.llm.get_input_embeddings()(ids)
        out = run_backbone(self.llm.base_model, embeds, allowed, positions, self.cache, self.mask)
        self.mask = torch.cat([self.mask, mask], dim=1)                                     # (B, P + T)
        return head_logits(self.llm, out.last_hidden_state[:, -1])

    def go_on(self, tokens: Tensor, kept: Tensor) -> None:
        """Read a token of each row, (B,), and go on with the `kept` ones, indices of rows."""
        if len(kept) < len(tokens):
            self.cache.batch_select_indices(kept)
            self.mask = self.mask[kept]
        self.logits = self.read(tokens[kept, None], torch.ones_like(kept, dtype=torch.bool)[:, None])


class EncodedRows:
    """As `Rows`, of an encoder-decoder LLM: it encodes [prefix ; query], and the answer is the decoder's."""

    def __init__(self, llm: PreTrainedModel, prefix: Prefix, queries: Sequence[list[int]]):
        ids, mask = (t.flip(1).to(llm.device) for t in padded_left([row[::-1] for row in queries]))  # (B, T)
        embeds = torch.cat([prefix.embeds.expand(len(ids), -1, -1), llm.get_input_embeddings()(ids)], dim=1)
        self.llm, self.cache = llm, None
        self.mask = torch.cat([prefix.mask.expand(len(ids), -1), mask], dim=1)              # (B, P + T)
        self.encoded = llm.get_encoder()(inputs_embeds=embeds, attention_mask=self.mask).last_hidden_state
        self.logits = self.read(torch.full_like(ids[:, :1], llm.config.decoder_start_token_id))

    def read(self, ids: Tensor) -> Tensor:
        out = self.llm(encoder_outputs=BaseModelOutput(self.encoded), attention_mask=self.mask,
                       decoder_input_ids=ids, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        return out.logits[:, -1].float()

    def go_on(self, tokens: Tensor, kept: Tensor) -> None:
        if len(kept) < len(tokens):
            self.cache.batch_select_indices(kept)
            self.mask, self.encoded = self.mask[kept], self.encoded[kept]
        self.logits = self.read(tokens[kept, None])


def choose(logits: Tensor, temperature: float, top_p: float, draws: list[random.Random]) -> Tensor:
    """The next token of each row: (B, V) -> (B,). Greedy at temperature 0, else drawn from the most likely
    tokens that hold `top_p` of the probability, by one number of the row's own source in `draws`."""
    if temperature == 0:
        return logits.argmax(dim=1)
    scores = TemperatureLogitsWarper(float(temperature))(None, logits)
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    total = scores.softmax(dim=1).cpu().double().cumsum(dim=1)                              # (B, V)
    drawn = torch.tensor([draw.random() for draw in draws], dtype=torch.double)[:, None] * total[:, -1:]
    return torch.searchsorted(total, drawn, right=True)[:, 0].to(logits.device)


class Writer:
    """An LLM that has read a prefix, and writes answers to queries after it.

    Args:
        llm: frozen, in any float type. formatter: of its tokenizer and the vectors' template.
        vectors: (l, d) distilled vectors or embeddings of demonstrations, (l, W) keys and values, or (0, d).
    """

    def __init__(self, llm: PreTrainedModel, formatter: Formatter, vectors: Tensor):
        check_llm_config("the LLM", llm.config)
        self.llm, self.formatter, self.first = llm, formatter, len(vectors) == 0
        with torch.no_grad():
            self.prefix = vector_prefix(llm, vectors[None].to(llm.device), formatter.turns.head)
        ends = llm.generation_config.eos_token_id
        ends = llm.config.eos_token_id if ends is None else ends
        self.ends = {*ends} if isinstance(ends, list | tuple) else {ends}

    @classmethod
    def load(cls, path: str, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | str) -> "Writer":
        """Of a file that `distill.py --out` has written; UserError where it is another LLM's."""
        vectors, about = read_vectors(path, llm)
        return cls(llm, Formatter(Tokenizer(tokenizer), about["template"], 0), vectors)

    def query_ids(self, text: str) -> list[int]:
        """An input as the LLM reads it after the prefix: the template's text around it, and no BOS."""
        return asked(self.formatter, {"input": text.strip()}, self.first)

    def write(self, inputs: Sequence[str], **how) -> list[str]:
        """The answer to each input; `how` as in `stream`."""
        answers = [""] * len(inputs)
        for number, piece in self.stream(inputs, **how):
            answers[number] += piece
        return answers

    @torch.no_grad()
    def stream(self, inputs: Sequence[str], max_new_tokens: int = 64, temperature: float = 0.0,
               top_p: float = 1.0, seed: int = 0, stop: str = "\n",
               batch_size: int = 16) -> Iterator[tuple[int, str]]:
        """Yields (number of the input, next piece of its answer), in turn, as the pieces are written.

        Args:
            inputs: texts, without the template, which is put around them. temperature: 0 for the likeliest
                token, else of the softmax that is drawn from. top_p: draw from the likeliest tokens that hold
                so much of the probability. seed: an input's answer is a function of it and the input, not of
                what is asked beside it. stop: the answer ends before this; "": only at the LLM's own end.
        Raises:
            UserError: an empty input, a number out of range, more tokens than the LLM has positions for.
        """
        check((not isinstance(inputs, str), "inputs is one text; give a list of texts"),
              (all(isinstance(text, str) and text.strip() for text in inputs),
               "an input is empty, or no text; ask something"),
              (max_new_tokens >= 1 and batch_size >= 1, "give 1 or more as max_new_tokens and as batch_size"),
              (0 <= temperature < float("inf"), f"temperature is {temperature}; give 0 (greedy) or more"),
              (0 < top_p <= 1, f"top_p is {top_p}; give more than 0, and 1 at most"))
        encoded = [self.query_ids(text) for text in inputs]
        longest = self.prefix.mask.shape[1] + max(map(len, encoded), default=0) + max_new_tokens
        most = None if self.llm.config.is_encoder_decoder else max_positions(self.llm.config)
        check((not encoded or most is None or longest <= most,
               f"prefix, query and {max_new_tokens} new tokens take {longest} positions, and the LLM has "
               f"{most}; give fewer max_new_tokens"))
        kind = EncodedRows if self.llm.config.is_encoder_decoder else Rows
        for start in range(0, len(encoded), batch_size):
            queries = encoded[start:start + batch_size]
            draws = [random.Random(f"{seed} {query}") for query in queries]
            rows, texts = kind(self.llm, self.prefix, queries), [Text(self, stop) for _ in queries]
            alive = [*range(len(queries))]  # the query of each row
            for step in range(max_new_tokens):
                require_finite("what the LLM predicts", rows.logits)
                tokens = choose(rows.logits, temperature, top_p, [draws[i] for i in alive])
                for i, token in zip(alive, tokens.tolist(), strict=True):
                    if piece := texts[i].add(token, last=step + 1 == max_new_tokens):
                        yield start + i, piece
                kept = [row for row, i in enumerate(alive) if not texts[i].over]
                if not kept or step + 1 == max_new_tokens:
                    break
                alive = [alive[row] for row in kept]
                rows.go_on(tokens, torch.tensor(kept, device=tokens.device))


class Text:
    """An answer while it is written: what of its tokens' text can be told already, and whether it is over."""

    def __init__(self, writer: Writer, stop: str):
        self.decode, self.ends, self.stop = writer.formatter.tokenizer.hf.decode, writer.ends, stop
        self.ids: list[int] = []
        self.told, self.over = "", False

    def add(self, token: int, last: bool) -> str:
        """The piece that a token adds, perhaps none: white space, the beginning of `stop` and half a
        character wait for what comes after them, and have no place at the end."""
        self.ids.append(token)
        self.over = last or token in self.ends
        text = self.decode(self.ids, skip_special_tokens=True).lstrip()
        if self.stop and self.stop in text:
            text, self.over = text.split(self.stop)[0], True
        elif not self.over:
            text = text.rstrip("\ufffd")
            begun = [n for n in range(1, len(self.stop)) if text.endswith(self.stop[:n])]
            text = text[:len(text) - max(begun, default=0)]
        text = text.rstrip()
        piece, self.told = text[len(self.told):], max(self.told, text, key=len)
        return piece
