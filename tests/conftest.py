"""Tiny random models, tasks and text, made on the spot: no network, no assets."""

import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from sizes import TINY
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from training import METRICS
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import common
import plain
import sources.tasks
import train_finetune
import train_pretrain
from data import Formatter, collate
from loading import build_distiller, distiller_config, load_llm
from model import demo_prefix, loss_mask, query_states, vector_prefix
from paper import measure
from run import save_checkpoint
from score import distill_loss, pred_loss
from serving.writer import Text
from sources import assets
from sources.tasks import load_tasks
from sources.text import Tokenizer as OurTokenizer

CPU = torch.device("cpu")
torch.set_num_threads(1)  # models this small wait for a second thread 20 times longer than it works


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs subprocesses or minutes; run with -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"


# Text, tasks and tokenizers

def write_lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts_of(folder: Path) -> list[str]:
    return [record["text"] for path in sorted(folder.iterdir()) for record in read_lines(path)]


def example(text: str, output: str = "happy", options=("happy", "sad"), task: str = "t") -> dict:
    return {"task": task, "input": text, "output": output, "options": list(options)}


def write_tasks(folder: Path, train: dict[str, list[dict]], test: dict[str, list[dict]]) -> Path:
    """Tasks in MetaICL's layout: pools of meta-training tasks, and files of seed 100 of meta-test tasks."""
    of_test = [f"16_100_{part}" for part in ("train", "dev", "test")]
    for tasks, stems in ((train, ["16384_100_train"]), (test, of_test)):
        for task, examples in tasks.items():
            (folder / task).mkdir(parents=True, exist_ok=True)
            for stem in stems:
                write_lines(folder / task / f"{task}_{stem}.jsonl", examples)
    return folder


WORDS = [
    "the", "river", "is", "cold", "and", "a", "small", "boat", "goes", "slowly", "past", "green",
    "hills", "while", "people", "talk", "of", "rain", "bread", "music", "war", "trade", "law", "ships",
    "letters", "houses", "12", "1907", "3.5", "café", "naïve", "don't", "it's", "they'll",
]
LABELS = {"good": "happy", "bad": "sad", "odd": "strange"}


def sentence(rng: random.Random, n_words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n_words))


def write_tokenizer(folder: Path, digits: bool) -> int:
    rng = random.Random(0)
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                     byte_level]) if digits else byte_level
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([sentence(rng, 50) for _ in range(50)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    return backend.get_vocab_size()


def write_sentencepiece(folder: Path, kind: str, texts: list[str], vocab_size: int = 200) -> int:
    """A tokenizer that puts a space before the text, as SentencePiece's do; returns its size.

    t5: unigram, white space collapses, newlines too, and </s> ends a text. llama2: BPE, white space stays.
    """
    if kind == "t5":
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "),
                                                   normalizers.Strip()])
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(vocab_size=vocab_size, special_tokens=["<pad>", "</s>", "<unk>"],
                                          unk_token="<unk>", show_progress=False)
        names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()  # while training: no token crosses words
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"],
                                      show_progress=False, initial_alphabet=["\n"])
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    backend.train_from_iterator(texts, trainer)
    if kind == "llama2":
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    single, special = ("$A </s>", "</s>") if kind == "t5" else ("<s> $A", "<s>")
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(special, backend.token_to_id(special))])
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return backend.get_vocab_size()


def sentencepiece(folder: Path, corpus_dir: Path, kind: str) -> OurTokenizer:
    write_sentencepiece(folder / kind, kind, texts_of(corpus_dir))
    return OurTokenizer(str(folder / kind))


@pytest.fixture
def word_tokenizer(tmp_path):
    """Not byte-level, and with a BOS that its template adds."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2, "boat": 3, "sad": 4},
                                         unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "word")
    return OurTokenizer(str(tmp_path / "word"))


# Models

def write_llm(folder: Path, family: str) -> Path:
    """A tiny random LLM with its tokenizer. Weights are large enough for attention to matter."""
    vocab = write_tokenizer(folder, digits=family == "llama")
    torch.manual_seed(0)
    if family == "gpt2":
        llm = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_embd=32, n_layer=3, n_head=4, n_positions=640,
                                         initializer_range=0.2, bos_token_id=0, eos_token_id=0))
    else:
        llm = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=32, intermediate_size=64,
                                           num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                                           max_position_embeddings=2048, initializer_range=0.2,
                                           tie_word_embeddings=True, bos_token_id=0, eos_token_id=0))
    llm.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> Path:
    return write_llm(tmp_path_factory.mktemp("models") / "tiny-gpt2", "gpt2")


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return write_llm(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def llm_folder(request) -> Path:
    return request.getfixturevalue(request.param)


def load(folder: Path):
    return load_llm(str(folder), CPU, torch.float32)


@pytest.fixture(scope="session")
def llm(llm_folder):
    return load(llm_folder)


@pytest.fixture(scope="session")
def llama_llm(llama):
    return load(llama)


def make_distiller(llm, spec: str = "layers:2", distill_len: int = 4, start: str = "matched", seed: int = 0):
    """A distiller without dropout, so that two runs can be compared."""
    return build_distiller(spec, llm, distill_len, start, seed).eval()


def model_of(distiller, llm, spec: str = "layers:2", start: str = "matched") -> dict:
    """What a checkpoint says of its distiller."""
    return distiller_config(distiller, llm, SimpleNamespace(
        distiller=spec, distill_len=distiller.distill_len, vector_start=start, template="space",
        elastic=False))


def save_distiller(folder: Path, distiller, llm, spec: str = "layers:2", start: str = "matched",
                   **state) -> Path:
    """A run folder as training leaves it."""
    state = {"model": model_of(distiller, llm, spec, start)} | state
    save_checkpoint(folder / "best.safetensors", distiller, state)
    return folder


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory) -> Path:
    return write_class_tasks(tmp_path_factory.mktemp("data") / "tasks")


def write_class_tasks(folder: Path) -> Path:
    """Five meta-training and two meta-test tasks of class_to_class in MetaICL's layout."""
    rng = random.Random(1)

    def example(task: str) -> dict:
        label = rng.choice(list(LABELS.values()))
        clue = next(clue for clue, name in LABELS.items() if name == label)
        return {"task": task, "input": f"{sentence(rng, rng.randint(3, 9))} {clue}", "output": label,
                "options": sorted(LABELS.values())}

    def write(task: str, stem: str, n: int) -> None:
        (folder / task).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(example(task)) for _ in range(n)]
        (folder / task / f"{task}_{stem}.jsonl").write_text("\n".join(lines) + "\n")

    for task in ("emotion", "glue-sst2", "trec", "rotten_tomatoes", "sms_spam"):
        write(task, "16384_100_train", 60)
    for task in ("ag_news", "emo"):
        for seed in sources.tasks.SEEDS:
            write(task, f"16_{seed}_train", 16)
            write(task, f"16_{seed}_dev", 16)
            write(task, f"16_{seed}_test", 24)
    return folder


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "text")


def write_corpus(folder: Path) -> Path:
    rng = random.Random(2)
    folder.mkdir()
    documents = [{"text": sentence(rng, rng.randint(40, 120))} for _ in range(60)]
    (folder / "part.jsonl").write_text("\n".join(map(json.dumps, documents)) + "\n")
    return folder


@pytest.fixture(autouse=True)
def same_attention():
    """A training on a CPU chooses another attention of torch's: the next test finds the usual one."""
    usual = torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.backends.cuda.enable_flash_sdp(usual)


@pytest.fixture(autouse=True)
def private_folders(monkeypatch, tmp_path):
    """Nothing is read from or written to the repository's own cache/ and out/, and nothing fetched."""
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(common, "OUT", tmp_path / "out")
    monkeypatch.setattr(assets, "ensure", lambda path: None)


@pytest.fixture
def flags(llama, tasks_dir, corpus_dir) -> list[str]:
    """What makes any training script small: a tiny LLM, tiny data, two layers of distiller, l = 4."""
    return ["--preset", "pocket", "--llm", str(llama), "--distiller", "layers:2", "--distill-len", "4",
            "--tasks", str(tasks_dir), "--dtype", "fp32", "--device", "cpu"]


@pytest.fixture
def tiny_tasks(tasks_dir):
    return load_tasks(str(tasks_dir), "class_to_class")


@pytest.fixture
def tokenizer(llama):
    return OurTokenizer(str(llama))


class LogitsAreStates(nn.Module):
    """An LLM whose head is the identity: a state is its logits."""

    dtype = torch.float32

    def __init__(self, **config):
        super().__init__()
        self.config, self.head = SimpleNamespace(**config), nn.Identity()

    def get_output_embeddings(self):
        return self.head


@pytest.fixture(scope="session")
def setting(llama, llama_llm):
    """An LLM, a distiller with l = 4, a formatter, and flags with a budget of 24."""
    tokenizer = OurTokenizer(str(llama))
    return SimpleNamespace(llm=llama_llm, distiller=make_distiller(llama_llm), tokenizer=tokenizer,
                           formatter=Formatter(tokenizer, "space", context_len=900, distill_len=24),
                           args=SimpleNamespace(distill_len=24, dtype="fp32"))


@pytest.fixture
def tiny(monkeypatch):
    """Every LLM that is counted, in a size that takes no time."""
    for name, config in TINY.items():
        monkeypatch.setitem(measure.CONFIGS, name, config)


# Rows of tokens, and what plain.py makes of them

def close(found, expected, tolerance: float = 1e-4):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=tolerance,
                               rtol=tolerance)


def demos(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["demo_ids"], batch["demo_mask"]


def log_softmaxes(llm, context: torch.Tensor, x: list[int]) -> torch.Tensor:
    """What an LLM without cache or packing says about x after embedded `context`, (n, V)."""
    inputs = torch.cat([context, llm.get_input_embeddings()(torch.tensor([x]))], dim=1)
    logits = llm(inputs_embeds=inputs, attention_mask=torch.ones_like(inputs[:, :, 0])).logits[0]
    return logits[max(context.shape[1] - 1, 0):-1].log_softmax(dim=1)


def ids_maker(seed: int = 0):
    rng = random.Random(seed)
    return lambda n: [rng.randrange(1, 300) for _ in range(n)]


def training_rows() -> list[dict]:
    """Ragged rows with several queries of one answer each: padding on both sides, and packing."""
    ids = ids_maker(1)
    return [{"demo": ids(9), "queries": [(ids(5), [ids(2)]), (ids(3), [ids(4)]), (ids(6), [ids(1)])]},
            {"demo": ids(17), "queries": [(ids(2), [ids(3)])]},
            {"demo": ids(4), "queries": [(ids(7), [ids(2)]), (ids(1), [ids(2)])]}]


def scoring_rows() -> list[dict]:
    """Ragged rows with different numbers of queries, and of options of different lengths."""
    ids = ids_maker(2)
    return [{"demo": ids(6), "queries": [(ids(5), [ids(1), ids(3), ids(2)]), (ids(2), [ids(2), ids(2)])]},
            {"demo": ids(13), "queries": [(ids(3), [ids(2), ids(1), ids(4), ids(1)])]},
            {"demo": ids(8), "queries": [(ids(1), [ids(2)]), (ids(4), [ids(1), ids(1)]),
                                         (ids(6), [ids(5), ids(2)])]}]


def ways(rows: list[dict]):
    """(row, query, option number, x, option) for every way through every query."""
    for b, row in enumerate(rows):
        for s, (x, options) in enumerate(row["queries"]):
            for o, option in enumerate(options, 1):
                yield b, s, o, x, option


def where(batch: dict, b: int, s: int, o: int) -> torch.Tensor:
    """Columns of query s's own tokens (o = 0) or of its option o, in row b."""
    return batch["query_mask"][b] & (batch["query"][b] == s) & (batch["branch"][b] == o)


def losses(llm, distiller, rows: list[dict], head=()):
    """(pred, distill) of rows, the way a training step does it."""
    batch = collate(rows)
    with torch.no_grad():
        teacher = query_states(llm, demo_prefix(llm, *demos(batch), head), batch)
    student = query_states(llm, vector_prefix(llm, distiller(*demos(batch)), head), batch)
    mask, answers = loss_mask(llm, batch), batch["query_mask"] & (batch["branch"] > 0)
    pred = pred_loss(llm, student[answers], batch["query_ids"][answers])
    return pred, distill_loss(llm, student[mask], teacher[mask])


def plain_losses(llm, rows: list[dict], students: list[torch.Tensor], teachers: list[torch.Tensor]):
    """(L_pred or None, L_distill) of rows by plain.py, each a mean over all tokens; a prefix of either kind
    for each row.

    A row is what data.collate takes, with at most one answer a query.
    """
    student_logits, teacher_logits, answer_logits, answer_ids = [], [], [], []
    for row, student, teacher in zip(rows, students, teachers, strict=True):
        for x, answers in row["queries"]:
            y = [token for answer in answers for token in answer]
            with torch.no_grad():
                teacher_logits.append(plain.read(llm, teacher, x, y))
            student_logits.append(plain.read(llm, student, x, y))
            answer_logits.append(student_logits[-1][len(student_logits[-1]) - len(y):])
            answer_ids += y
    pred = plain.pred_loss(torch.cat(answer_logits), answer_ids) if answer_ids else None
    return pred, plain.distill_loss(torch.cat(student_logits), torch.cat(teacher_logits))


def plain_scores(llm, rows: list[dict], prefixes: list[torch.Tensor]) -> list[list[list[float]]]:
    """Scores by plain.py as [row][query][option]; a prefix for each row."""
    return [[plain.score_options(llm, prefix, x, options).tolist() for x, options in row["queries"]]
            for row, prefix in zip(rows, prefixes, strict=True)]


@pytest.fixture
def texts(monkeypatch) -> list[Text]:
    """Every answer that a Writer begins from here on."""
    begun, init = [], Text.__init__
    monkeypatch.setattr(Text, "__init__", lambda self, *args: (begun.append(self), init(self, *args))[1])
    return begun


# Training

@pytest.fixture
def small(flags) -> list[str]:
    return [*flags, "--vector-start", "matched", "--k", "4", "--batch-size", "2", "--grad-accum", "2",
            "--steps", "4", "--eval-every", "2", "--lr", "1e-3"]


@pytest.fixture
def pretraining(small, corpus_dir) -> list[str]:
    return [*small, "--corpus", str(corpus_dir), "--window", "96", "--eval-docs", "3"]


@pytest.fixture
def finetuning(small) -> list[str]:
    return [*small, "--queries-per-demo", "2"]


@pytest.fixture(params=[train_pretrain, train_finetune], ids=lambda module: module.__name__)
def script(request):
    return request.param


@pytest.fixture
def argv(script, pretraining, finetuning) -> list[str]:
    return {train_pretrain: pretraining, train_finetune: finetuning}[script]


@pytest.fixture
def quick_dev(monkeypatch):
    """The tasks' dev data costs the most time; most tests here are not about it."""
    for script in (train_pretrain, train_finetune):
        monkeypatch.setattr(script, "dev_metrics", lambda *_: dict.fromkeys(METRICS, 1.0))
