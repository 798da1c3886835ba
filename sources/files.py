"""Files that no fault may harm: written whole or by whole lines, by one process at a time.

Results, checkpoints and caches are written here alone (assets and hub tasks in a temporary folder that is
renamed at the end): a kill, a full disk or a second process at any moment leaves what was there before, or
all of the new.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from common import UserError, check, is_main

TEMPORARY = re.compile(r"\..+\.(\d+)\.([\w-]*)\.mend\.tmp")  # what `temporary_of` gives, and nobody else
HOST = re.sub(r"[^\w-]", "-", platform.node())[:16]
HELD: dict[Path, FileLock] = {}


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary name to write to; after the block its file stands at `path`, on the disk and under the
    umask's mode. After any fault `path` is as it was."""
    path = Path(path)
    target = Path(os.path.realpath(path))  # a link stays one
    temporary = temporary_of(target)
    try:
        if target.exists() and not target.is_file():
            raise OSError("it is no plain file")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}); give another place, or "
                        "make room there") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_of(target: Path) -> Path:
    """The name beside a file or folder under which it is made."""
    return target.with_name(f".{target.name}.{os.getpid()}.{HOST}.mend.tmp")


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a whole file, text as UTF-8; raises UserError where it cannot be."""
    with whole(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_tensors(path: Path, tensors: dict, metadata: dict[str, str]) -> None:
    """Write a whole safetensors file; raises UserError where it cannot be."""
    from safetensors.torch import save_file
    with whole(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def append(path: Path, record: dict) -> None:
    """Add one JSON object as a line, on the disk when this returns. A last line that a kill has cut is cut
    off first; where the disk is full the file is as it was. Raises UserError, also for a number that is not
    finite."""
    wrong = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    check((not wrong, f"{', '.join(wrong)} not finite, so {path} got no line: {str(record)[:300]}"))
    line = f"{json.dumps(record)}\n".encode()
    try:
        with path.open("ab+", buffering=0) as file:
            before = heal(file)
            try:
                written = file.write(line)
                if written != len(line):
                    raise OSError("no room for the line")
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(before)
                raise
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); make room there, and give the same command "
                        "again") from error


def heal(file) -> int:
    """Make an open file end in a whole line, and return its size: a last line without its end gets it where
    it is JSON, and is cut off where it is the beginning of an object; anything else is an error."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if size == 0 or file.read(1) == b"\n":
        return size
    file.seek(0)
    content = file.read()
    last = content[content.rfind(b"\n") + 1:]
    try:
        json.loads(last)
    except ValueError:
        if not last.startswith(b"{"):
            raise OSError("its last line is no JSON") from None
        file.truncate(size - len(last))
        return size - len(last)
    file.write(b"\n")
    return size + 1


def keep_lines(path: Path, keep: Callable[[dict], bool]) -> None:
    """Leave out the lines of a file whose JSON object `keep` does not want, and a last one that a kill cut;
    lines of another kind stay. The file is only touched where something is left out."""
    before = path.read_bytes() if path.exists() else b""
    kept = []
    for line in before.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            if not line.endswith(b"\n"):
                continue
            record = None
        if not isinstance(record, dict) or keep(record):
            kept.append(line)
    if b"".join(kept) != before:
        write_whole(path, b"".join(kept))


def hold(place: Path, flag: str, wait: bool = False) -> None:
    """Take `place`, a folder or a file to be written, for this process (of several ranks the first), until
    `release` or its end; and clear away what killed writers left there. Where another process has it, wait
    for its end, or raise UserError."""
    place = Path(os.path.realpath(place))
    if place in HELD or not is_main():
        return
    folder = place if place.is_dir() else place.parent
    name = ".mend.lock" if place.is_dir() else f".{place.name}.mend.lock"
    lock = FileLock(folder / name)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            if not wait:
                raise UserError(f"another process is writing to {flag} {place}; wait for its end, or give "
                                f"another {flag}") from error
            print(f"another process is writing to {place}: waiting for its end", file=sys.stderr)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise UserError(f"{flag} {place} cannot be locked ({error}); give another place") from error
    HELD[place] = lock
    for path in folder.iterdir():
        own = place.is_dir() or path.name.startswith(f".{place.name}.")
        match = TEMPORARY.fullmatch(path.name)
        # of several ranks the others may be writing just now, each under its number and machine
        busy = "RANK" in os.environ and match and (match[2] != HOST or is_alive(int(match[1])))
        if own and match and not busy:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def release(place: Path) -> None:
    """Give up what `hold` took."""
    if lock := HELD.pop(Path(os.path.realpath(place)), None):
        lock.release()


@contextlib.contextmanager
def held(place: Path, flag: str, wait: bool = False) -> Iterator[None]:
    """`hold` over a block."""
    hold(place, flag, wait)
    try:
        yield
    finally:
        release(place)


def content_hash(files: list[Path]) -> str:
    """Hash of names and contents: of a file over 16 MiB its length and 4 KiB of each 256, which takes
    milliseconds where all of a large model would take seconds."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(os.fsencode(path.name) + f"/{size}/".encode())
        with path.open("rb") as file:
            if size <= 1 << 24:
                digest.update(file.read())
            else:
                for start in range(0, size, 1 << 18):
                    file.seek(start)
                    digest.update(file.read(1 << 12))
    return digest.hexdigest()[:12]
