"""All that is written to a disk goes through here: whole files, directories of our own, locks.

A file is written beside its place and renamed there once its bytes are on the disk, so that a full disk
or a kill leaves what was there before. Nothing is replaced or deleted that is read, or that was not
written by this package; no link is followed where others could have put it.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from expunge.errors import InputError, RunError

PART = re.compile(r"\.expunge-[0-9a-f]{16}")
"""Name of what `whole` has begun to write."""
_LARGEST = 2**30
"""Bytes of a file that is read to see whether it was written here."""
_LITTLE = 2**16
"""Bytes that there must be room for, so that a full disk is found before the work."""
_OTHERWISE = (
    InputError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
)  # fmt: skip
"""What a file of another kind makes its reader raise."""
_MENDS = {
    errno.ENOSPC: "; make room there",
    errno.EDQUOT: "; make room there",
    errno.EFBIG: "; raise the limit on the size of files (ulimit -f), or choose another disk",
}


def settle(path: Path) -> None:
    """Returns once a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # no such thing there
            raise
    finally:
        os.close(descriptor)


@contextmanager
def whole(path: Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """A file that takes its place when the body ends, and leaves what is there where it fails.

    A new file has the mode of the umask, or is for its owner alone (`private`); one that is replaced
    keeps its own. A link stays a link, to the new file. Raises OSError.
    """
    path = _real(path)
    if path.exists() and not path.is_file():  # a pipe or a device; a directory refuses
        with path.open("wb") as file:
            yield file
        return
    part = path.with_name(f".expunge-{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(part, flags, 0o600 if private else 0o666), "wb") as file:
            if path.exists() and not private:
                part.chmod(stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    settle(path.parent)


def write_whole(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Writes `content` as `whole` does; text as UTF-8. Raises OSError."""
    with whole(path, private=private) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def deliver(files: Mapping[Path, str], *, private: Collection[Path] = ()) -> None:
    """Writes the results of work that is done; none of them is lost because its place is.

    One that cannot be put there goes, for the owner alone, beside it, or to the working directory or
    that of temporary files. Raises RunError that says where it is.
    """
    said = []
    for path, text in files.items():
        try:
            write_whole(path, text, private=path in private)
        except OSError as error:
            why = f"{error.strerror}{_MENDS.get(error.errno or 0, '')}"
            said.append(f"{path}: {why}; {_elsewhere(path, text)}")
    if said:
        raise RunError("; ".join(said))


def _elsewhere(path: Path, text: str) -> str:
    name = f"{path.stem[:100]}-{secrets.token_hex(4)}{path.suffix}"
    for directory in (path.absolute().parent, Path.cwd(), Path(tempfile.gettempdir())):
        with suppress(OSError):
            write_whole(directory / name, text, private=True)
            return f"what was to be written is in {directory / name}"
    return "no other place could be written to either"


@contextmanager
def held(path: Path, refusal: str) -> Iterator[None]:
    """Holds the lock of a file for the body; the file is made where there is none, and not changed.

    Raises InputError with the refusal where another process holds it, and where it is a link.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    if path.is_symlink():
        raise InputError(f"{path}: is a link; move it away")
    with os.fdopen(os.open(path, flags, 0o600), "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(refusal) from None
        yield


def own(path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Makes a directory that its owner alone can enter, or proves one that is there.

    Raises InputError for a link, another user's, one that others may have written into, and one that
    is not empty and not `is_ours`.
    """
    try:
        path.mkdir(mode=0o700)
        return
    except FileExistsError:
        found = path.lstat()
    # Some file systems have one owner and one mode for all: what is made there now tells.
    probe = Path(tempfile.mkdtemp(prefix=".expunge-", dir=path.parent))
    usual = probe.stat()
    probe.rmdir()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == usual.st_uid:
        if not any(path.iterdir()):
            path.chmod(0o700)
            return
        if not found.st_mode & 0o022 & ~usual.st_mode and is_ours(path):
            return
    raise InputError(f"{path}: is there, and not made by this command; move it away")


@contextmanager
def made(directory: Path) -> Iterator[None]:
    """A directory for what the body writes; a new one goes again if it fails with nothing in it."""
    new = not directory.exists()
    try:
        directory.mkdir(exist_ok=True)
        yield
    except BaseException:
        if new:
            with suppress(OSError):  # something is in it
                directory.rmdir()
        raise


def remove(path: Path) -> None:
    """Deletes a file, a link or a directory with all that is in it; no link is followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_written(option: str, output: Path, patterns: Collection[str]) -> None:
    """Raises InputError where a directory holds an entry of another name than what is written there."""
    others = sorted(
        entry.name
        for entry in output.iterdir()
        if not any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in patterns)
    )
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise InputError(
            f"{option} {output}: holds {others[0]}{more}, which this command does not write and would"
            " delete; move it elsewhere, or choose another directory"
        )


def check_not_read(option: str, output: Path, read: Mapping[str, str | None]) -> None:
    """Raises InputError where what is read is the output, or in it: it would be replaced with it.

    `read` holds the paths of what is read, by the option that names it.
    """
    there = _real(output)
    for other, given in read.items():
        if given is None or not Path(given).exists():
            continue
        parts = [Path(given)]
        if parts[0].is_dir():  # of links, as a hub's cache makes them
            parts += [entry for entry in parts[0].iterdir() if entry.is_symlink() and entry.is_file()]
        for part in map(_real, parts):
            same = there.is_file() and part.is_file() and part.samefile(there)
            if part == there or there in part.parents or same:
                verb = "holds" if there.is_dir() else "is"
                raise InputError(f"{option} {output}: {verb} what --{other} reads; choose another place")


def _real(path: Path) -> Path:
    """Without links; one that leads to itself stays."""
    return Path(os.path.realpath(path))


def nearest(path: Path) -> Path:
    """The path itself where it exists, or the first above it that does."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_file_output(
    option: str, path: Path, read: Mapping[str, str | None], is_ours: Callable[[str], bool]
) -> None:
    """Raises InputError where no file can be written there, or one would be lost.

    `read` as for `check_not_read`; `is_ours` says of a file's text whether the option wrote it.
    """
    place = _real(path)
    if not place.parent.is_dir():
        raise InputError(f"--{option} {path}: its directory does not exist; make it first")
    if place.is_dir() or place.is_socket():
        kind = "directory" if place.is_dir() else "socket"
        raise InputError(f"--{option} {path}: is a {kind}; name a file")
    check_not_read(f"--{option}", path, read)
    if place.is_file() and (size := place.stat().st_size):
        if not os.access(place, os.W_OK):
            raise InputError(f"--{option} {path}: is protected; choose another place")
        try:
            known = size < _LARGEST and is_ours(place.read_text(encoding="utf-8"))
        except _OTHERWISE:
            known = False
        if not known:
            raise InputError(
                f"--{option} {path}: is there, and not written by this option; choose another place"
            )
    if place.is_file() or not place.exists():
        check_writable(path, option=f"--{option}")


def check_writable(output: Path, *, inside: bool = False, option: str = "--output") -> None:
    """Raises InputError where the output cannot be made or, `inside`, nothing can be put into it."""
    if inside and output.is_symlink() and not output.exists():
        raise InputError(f"{option} {output}: is a link to nothing; name a directory")
    if _real(output).is_symlink():
        raise InputError(f"{option} {output}: is a link that leads to itself; name another place")
    place = nearest(output if inside else _real(output).parent)
    if not place.is_dir():
        raise InputError(f"{option} {output}: {place} is a file; choose another place")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(_LITTLE))
    except OSError as error:
        mend = _MENDS.get(error.errno or 0, "; choose another place")
        raise InputError(
            f"{option} {output}: {place} cannot be written to ({error.strerror}){mend}"
        ) from None


def explained(error: OSError) -> str:
    """What the system says, of which file, with the mend."""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror}{_MENDS.get(error.errno or 0, '')}"
