"""Made tasks that need their demonstrations: word functions, early evidence, associative recall.

    python data.py --tasks functions --show 4              # one function's demonstrations, from text to batch
    python train_finetune.py --tasks functions recall --template newline
    python evaluate.py --tasks early --template newline --checkpoint DIR

functions  a task is a function of a word, three words, a number, a date, a country, a path or a sentence
           (plural, last of three, weekday, ...). Its answer stands among those of other functions to the same
           input: only demonstrations tell which is right. Meta-test functions are held out, in every form.
early      as functions, for pairs of them: the first demonstrations tell the two apart, later ones fit both.
           Whoever reads the last tokens only cannot know which is meant. Trained on are other such pairs.
recall     demonstrations are pairs of words, new in each set; a query is one key, its options all values.
           Words of the meta-test never stand in training. The content has to survive, not only its gist.
"""

import functools
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from common import UserError, check
from sources.functions import DOMAINS, FORMS, answers, inputs
from sources.tasks import SEEDS, Tasks, rng_of, shuffled
from sources.text import Tokenizer

N_OPTIONS = 8  # options of a query at most
N_SHOTS, N_DEV, N_TEST = 32, 16, 32  # demonstrations and queries of a meta-test task for each seed
N_TELLING = 4  # demonstrations of early evidence that tell which function is meant: the first ones
HELD_OUT: dict[str, tuple[str, ...]] = {  # meta-test functions: in no form part of meta-training
    "noun": ("plural", "last letter", "twice", "two", "hashtag", "spelled"),
    "verb": ("past", "gerund", "future", "first two letters", "she", "in brackets"),
    "adjective": ("superlative", "very", "as", "first letter", "dotted"),
    "trio": ("first", "last", "joined by and", "shortest", "last two", "rotated"),
    "number": ("in words", "plus one", "ordinal", "Spanish", "percent", "last digit"),
    "country": ("capital", "German", "domain", "from"),
    "date": ("American", "month", "year", "unnatural", "day and month"),
    "path": ("file", "ending", "absolute", "copy"),
    "sentence": ("object", "past tense", "passive", "two words"),
}
PAIRS = (  # of early evidence: domain and two functions, the first held out
    ("trio", "first", "last"), ("trio", "first", "second"), ("trio", "last", "second"),
    ("trio", "last two", "first two"), ("trio", "shortest", "longest"),
    ("number", "last digit", "first digit"), ("verb", "past", "participle"),
    ("country", "German", "Italian"), ("date", "month", "German month"))


def parts_of(task: str) -> tuple[str, str, str]:
    """Domain, function and form of a task's name, "noun: plural" or "noun: plural, upper case"."""
    domain, _, rest = task.partition(": ")
    name, _, form = rest.partition(", ")
    return domain, name, form


def example(task: str, x: str, other: str | None = None) -> dict:
    """One example of a function: its answer among those of other functions of its domain to the same input.

    other: a function whose answer is to be among the options too.
    """
    domain, name, form = parts_of(task)
    made = {n: FORMS[form](y) for n, y in answers(domain, x).items()}
    wanted = dict.fromkeys([made[name], *([made[other]] if other else [])])
    rest = [y for y in dict.fromkeys(made.values()) if y not in wanted]
    rng = np.random.default_rng(zlib.crc32(f"{task} {x}".encode()))
    drawn = [rest[i] for i in rng.permutation(len(rest))[:N_OPTIONS - len(wanted)]]
    return {"task": task, "input": x, "output": made[name], "options": sorted([*wanted, *drawn])}


class Made(Tasks):
    """Tasks without files."""

    def training_hash(self) -> str:
        """Of the tasks' names and the first one's examples: the others' come from the same code."""
        return hashlib.sha256(json.dumps([self.train, self.pool(self.train[0])]).encode()).hexdigest()[:12]

    def retrieval_files(self, task: str) -> list[Path]:
        raise UserError("made tasks have no files to retrieve demonstrations from; leave --retrieve out")

    def data_hash(self, task: str, seed: int, retrieval: bool = False) -> str:
        return hashlib.sha256(json.dumps(self.files(task, seed)).encode()).hexdigest()[:12]


class Functions(Made):
    """The word functions as the tasks of a split. Each further form is a meta-training task of its own.

    k: demonstrations in a set: of 240 inputs of a trio, number, date, path or sentence, 160 at most.
    """

    def __init__(self, k: int = N_SHOTS):
        held_out = {name for names in HELD_OUT.values() for name in names}
        train = [f"{domain}: {name}" + (f", {form}" if form else "") for domain, functions in DOMAINS.items()
                 for name in functions if name not in held_out for form in FORMS]
        test = [f"{domain}: {name}" for domain, names in HELD_OUT.items() for name in names]
        super().__init__(Path("functions"), "functions", "functions", train, test, [], [],
                         dict.fromkeys([*train, *test], "multi-choice"))
        self.k = k

    def pool(self, task: str) -> list[dict]:
        if task not in self.pools:
            self.pools[task] = [example(task, x) for x in inputs(parts_of(task)[0])]
        return self.pools[task]

    def size(self, task: str) -> int:
        return len(inputs(parts_of(task)[0]))

    def files(self, task: str, seed: int) -> dict[str, list[dict]]:
        """The dev examples are those of one seed for all: no seed's queries have selected a checkpoint."""
        pool = self.pool(task)
        dev = shuffled(pool, task, SEEDS[0])[N_SHOTS:N_SHOTS + N_DEV]
        asked = {e["input"] for e in dev}
        rest = [e for e in shuffled(pool, task, seed) if e["input"] not in asked]
        more = rest[N_SHOTS + N_TEST:][:max(0, self.k - N_SHOTS)]  # the queries stay the same
        return {"train": rest[:N_SHOTS] + more, "dev": dev, "test": rest[N_SHOTS:N_SHOTS + N_TEST]}

    def partner(self, task: str, among: list[str]) -> str:
        """Another function of the same domain, where one is among them."""
        same = [t for t in among if parts_of(t)[0] == parts_of(task)[0]]
        return super().partner(task, same if len(same) > 1 else among)


@functools.cache
def split_inputs(domain: str, name: str, other: str) -> tuple[list[str], list[str]]:
    """The inputs of a domain on which two of its functions agree, and those on which they differ."""
    def agree(x: str) -> bool:
        return answers(domain, x)[name] == answers(domain, x)[other]

    xs = inputs(domain)
    # three times the same word: every choice and every order of them agrees
    alike = [", ".join(x.split(", ")[:1] * 3) for x in xs] if domain == "trio" else xs
    return [x for x in alike if agree(x)], [x for x in xs if not agree(x)]


def pair_of(task: str) -> tuple[str, list[str], str]:
    """Domain, both functions and form of a task's name, "trio: first / last, upper case"."""
    domain, names, form = parts_of(task)
    return domain, names.split(" / "), form


class Early(Functions):
    """PAIRS of functions: "trio: first / last" is the first of three words; on its first N_TELLING
    demonstrations the two functions differ, on all later ones they agree. On a query they differ.

    Meta-training has the pairs of functions that are not held out, in each form, with enough inputs of both
    kinds; how many of the first demonstrations tell, 1 to N_TELLING, is drawn.
    """

    def __init__(self):
        super().__init__()
        self.collection = self.split = "early"
        self.fit = functools.cache(self.fit)
        own = [parts_of(task) for task in self.train]
        self.train = [f"{d}: {a} / {b}" + (f", {form}" if form else "") for d in DOMAINS
                      for a, b in itertools.permutations([n for o, n, form in own if (o, form) == (d, "")], 2)
                      if min(map(len, split_inputs(d, a, b))) >= N_SHOTS // 2 for form in FORMS]
        self.test = [f"{domain}: {a} / {b}" for domain, f, g in PAIRS for a, b in ((f, g), (g, f))]
        self.types = dict.fromkeys([*self.train, *self.test], "multi-choice")

    def partner(self, task: str, among: list[str]) -> str:
        """The same pair the other way round, among them or not."""
        (own, other), domain = task.partition(": ")[2].split(" / "), parts_of(task)[0]
        return f"{domain}: {other} / {own}"

    def examples(self, task: str, rng: np.random.Generator) -> tuple[Iterator[dict], Iterator[dict]]:
        """The examples on which the two functions agree, and those on which they differ, shuffled and each
        made when it is asked for."""
        domain, (name, other), form = pair_of(task)
        own = f"{domain}: {name}" + (f", {form}" if form else "")

        def made(xs: list[str]) -> Iterator[dict]:
            order = rng.permutation(len(xs))  # now, as one generator serves both
            return (example(own, xs[i], other) for i in order)
        return tuple(map(made, split_inputs(domain, name, other)))

    def pool(self, task: str) -> list[dict]:
        return [*itertools.chain(*self.examples(task, np.random.default_rng(0)))]

    def fit(self, k: int, queries: int) -> list[str]:
        """The meta-training tasks with inputs enough for so many demonstrations and queries."""
        def is_enough(task: str) -> bool:
            domain, pair, _ = pair_of(task)
            same, differ = map(len, split_inputs(domain, *pair))
            return same >= k - 1 and differ >= N_TELLING + queries

        found = [*filter(is_enough, self.train)]
        check((bool(found), f"--tasks early has no pair of functions with inputs enough for --k {k} and "
               f"--queries-per-demo {queries}; give less"))
        return found

    def draw(self, rng: np.random.Generator, k: int, queries: int) -> tuple[str, list[dict], list[dict]]:
        fit = self.fit(k, queries)
        task = fit[rng.integers(len(fit))]
        same, differ = self.examples(task, rng)
        telling = int(rng.integers(1, min(N_TELLING, max(1, k // 2)) + 1))
        shown = [*islice(differ, telling), *islice(same, k - telling)]
        return task, shown, [*islice(differ, queries)]

    def files(self, task: str, seed: int) -> dict[str, list[dict]]:
        """As of `Functions`, with the dev examples of one seed for all."""
        def parts(seed: int) -> tuple[Iterator[dict], Iterator[dict]]:
            return self.examples(task, rng_of(task, seed))

        dev = [*islice(parts(SEEDS[0])[1], N_TELLING, N_TELLING + N_DEV)]
        asked = {e["input"] for e in dev}
        same, differ = parts(seed)
        differ = (e for e in differ if e["input"] not in asked)
        shown = [*islice(differ, N_TELLING), *islice(same, N_SHOTS - N_TELLING)]
        return {"train": shown, "dev": dev, "test": [*islice(differ, N_TEST)]}


class Recall(Made):
    """Associative recall: k pairs of words, of which a query asks for one. Every set has other pairs.

    Args:
        tokenizer: the first 5,000 English words of its vocabulary, of one token after a space each, make the
            pairs; every fifth stands in the meta-test tasks only. k: pairs in a set.
    """

    def __init__(self, tokenizer: Tokenizer, k: int):
        from lemminflect import getAllLemmas
        texts = (tokenizer.hf.decode([i]) for i in range(tokenizer.hf.vocab_size))
        words = [t[1:] for t in texts if t[0:1] == " " and len(t) > 3 and t[1:].isascii() and t[1:].isalpha()
                 and t[1:].islower() and getAllLemmas(t[1:])][:5000]
        if len(words) < 10 * k:
            raise UserError(f"--tasks recall with --k {k} draws from {10 * k} words or more of one token "
                            f"each, the vocabulary of {tokenizer.name} has {len(words)}; give a lower --k")
        test = [f"recall {i}" for i in range(1, 9)]
        super().__init__(Path("recall"), "recall", "recall", ["recall"], test, [], [],
                         dict.fromkeys(["recall", *test], "multi-choice"))
        self.k, self.words = k, ([w for i, w in enumerate(words) if i % 5], words[::5])

    def pairs(self, words: list[str], rng: np.random.Generator, k: int) -> list[dict]:
        chosen = [words[i] for i in rng.choice(len(words), 2 * k, replace=False)]
        keys, values = chosen[:k], chosen[k:]
        return [{"task": "recall", "input": x, "output": y, "options": values}
                for x, y in zip(keys, values, strict=True)]

    def draw(self, rng: np.random.Generator, k: int, queries: int) -> tuple[str, list[dict], list[dict]]:
        pairs = self.pairs(self.words[0], rng, k)
        return "recall", pairs, [pairs[i] for i in rng.choice(k, queries, replace=queries > k)]

    def pool(self, task: str) -> list[dict]:
        """One set of training pairs; every draw makes another."""
        return self.pairs(self.words[0], np.random.default_rng(0), self.k)

    def size(self, task: str) -> int:
        return len(self.words[0])

    def files(self, task: str, seed: int) -> dict[str, list[dict]]:
        """Demonstrations are all k pairs; dev asks for every other one, test for the rest."""
        rng = rng_of(task, seed)
        pairs = self.pairs(self.words[1], rng, self.k)
        dev, test = pairs[::2], pairs[1::2]
        if self.k > 16:  # --limit 8 would ask for the first 16 pairs alone
            test = [test[i] for i in rng.permutation(len(test))]
        return {"train": pairs, "dev": dev, "test": test}
