"""A copy of a run in a remote storage: objects below a URL that fsspec knows, like s3://bucket/runs/a. **Rank-local**.

<url>/checkpoints/
  snapshots/E7_U140_S8960/encoder.pt ...
  ledger.jsonl

The storage must give an object its new content in one step, as object stores do. In a folder of this machine it is
written beside its place, and renamed. Refs are in the ledger alone.
"""

from __future__ import annotations

import errno
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from keepbest.errors import ConfigError
from keepbest.printable import without_passwords
from keepbest.run.files import Files
from keepbest.run.layout import CHECKPOINTS, LEDGER, SNAPSHOTS, TEMPORARY

# How storages refuse a condition that they do not know; some say of one that does not hold no more than EINVAL. File
# systems without second names say the last three.
_NO_CONDITIONS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EMLINK, errno.ENOTSUP)
# s3fs holds ten parts in memory at a time, each twice, and the lock of the interpreter while it copies one of them. Its
# own parts have 50 MiB: training stands still for tens of milliseconds, and the process grows by 1 GB.
_PART_BYTES = 8 << 20
_MOST_PARTS = 10_000  # as S3 has it
_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[^{}/]+\})")  # of a shell, or of a library for configs


def is_remote(run: str | Path) -> bool:
    """Whether `run` is a URL rather than a directory."""
    return "://" in str(run)


def local_path(given: str | Path, setting: str = "") -> Path:
    """A path of this machine as it is now: absolute, so that `os.chdir` does not move it, and with `~` expanded.

    Every path that a user gives passes through here, when it is given.

    Args:
        given: Path.
        setting: Name of the setting that it is the value of, for messages.

    Raises:
        ConfigError: If it is a URL, even one that became a `Path`, or the home of nobody, or an empty text, or nothing
            on a disk can have this path, or it holds a variable that nothing has replaced.
    """
    if isinstance(given, str) and not given.strip():  # often a variable that is not set, which would be '.' as a path
        raise ConfigError(f"expected a path, got an empty text, {given!r}; the present directory is '.'")
    try:
        path = Path(given)
    except TypeError as error:
        raise ConfigError(f"expected a path, as text or as a pathlib.Path, got {given!r}") from error
    if re.match(r"[\w+.:-]+:/", str(given)):
        raise ConfigError(f"expected a directory of this machine, got {str(given)!r}; a URL is for remote copies")
    try:
        path = path.expanduser()
        _refuse_variable(path, setting)
        path = path.absolute()
    except RuntimeError as error:
        raise ConfigError(f"{str(given)!r} cannot be found: {error}") from error
    except FileNotFoundError as error:
        raise ConfigError(
            f"{str(given)!r} cannot be found, since the present directory was removed: give an absolute path"
        ) from error
    _check_can_exist(path)
    return path


def _refuse_variable(path: Path, setting: str) -> None:
    """Raise `ConfigError` if there is a variable in `path`, unless there is something of that literal name."""
    found = _VARIABLE.search(str(path))
    if found is None:
        return
    last = max(number for number, part in enumerate(path.parts) if _VARIABLE.search(part))
    if not os.path.lexists(Path(*path.parts[: last + 1])):
        _raise_for_variable(str(path), found[0], setting)


def _raise_for_variable(given: str, variable: str, setting: str) -> NoReturn:
    raise ConfigError(
        f"{setting + ': ' if setting else ''}{given!r} has the variable {variable} in it, which nothing replaces here: "
        "give the path that you mean. On a command line the shell replaces a variable, if it is not in single quotes, "
        "and in Python os.path.expandvars does"
    )


def _check_can_exist(path: Path) -> None:
    """Raise `ConfigError` if nothing can be at `path` as it is written, or as its links are now."""
    if not _is_utf8(path):
        raise ConfigError(
            f"{path} is not UTF-8, by which torch finds the files that it reads: give another path. Where it is, "
            f"set PYTHONUTF8=1, since this process takes the names of files for {sys.getfilesystemencoding()}"
        )
    try:
        path.stat()
    except ValueError as error:
        raise ConfigError(f"there can be nothing at {path}: {error}; give another path") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            remedy = (
                "remove one of the links, or give another path" if error.errno == errno.ELOOP else "give a shorter one"
            )
            raise ConfigError(f"there can be nothing at {path}: {error.strerror}; {remedy}") from error


def _is_utf8(path: Path) -> bool:
    try:
        return str(path).encode() == os.fsencode(path)
    except UnicodeEncodeError:
        return False


def place_of(run: str | Path) -> str | Path:
    """Where a run is that may be a URL: that, or the `local_path`. Raises `ConfigError` as that."""
    return str(run) if is_remote(run) else local_path(run, "run")


def check_remote(url: str | None) -> str | None:
    """`url`, after a check that fsspec can open it here. The storage itself is not contacted. **Rank-local**.

    A folder of this machine becomes absolute, as by `local_path`.

    Raises:
        ConfigError: If it is no URL, holds a variable or a password, or a package that opens it is not installed.
    """
    if url is None:
        return None
    if not is_remote(url):
        raise ConfigError(f"remote must be a URL like s3://bucket/runs/a, got {url!r}")
    if (found := _VARIABLE.search(url)) is not None:
        _raise_for_variable(url, found[0], "remote")
    filesystem, root = _filesystem(url)
    return f"file://{root}" if "file" in filesystem.protocol else url


class Remote:
    """The objects of one run. Credentials and endpoints are those of the environment, as fsspec reads them.

    Its methods raise what the client of the storage raises, which need not be an `OSError`.

    Attributes:
        url: URL of the run.

    Raises:
        ConfigError: As `check_remote`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._filesystem, root = _filesystem(url)
        self._root = f"{root.rstrip('/')}/{CHECKPOINTS}/"
        self._is_local = "file" in self._filesystem.protocol
        self._files = Files()

    def sizes(self) -> dict[str, int]:
        """The bytes of every object, by its path below `checkpoints`; empty if there is none."""
        self._filesystem.invalidate_cache()
        try:
            found: Mapping[str, Any] = self._filesystem.find(self._root.rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        return {path.removeprefix(self._root): about["size"] for path, about in found.items()}

    def read_ledger(self) -> bytes:
        """The whole lines of the ledger; empty if there is none.

        A copy that was made by other means, of a run that a crash has ended, may end with a line that was torn off.
        """
        data = self.read(LEDGER) or b""
        return data[: data.rfind(b"\n") + 1]

    def read(self, path: str) -> bytes | None:
        """What is at `path` below `checkpoints`; `None` if there is nothing."""
        try:
            data: bytes = self._filesystem.cat_file(f"{self._root}{path}")
        except FileNotFoundError:
            return None
        return data

    def write_ledger(self, data: bytes) -> None:
        """Put a new ledger in the place of the old one."""
        if self._is_local:
            temporary = self._write_beside(LEDGER, data)
            self._put_in_place(temporary, LEDGER)
            return
        self._filesystem.pipe_file(f"{self._root}{LEDGER}", data)

    def write_first_ledger(self, data: bytes) -> bool:
        """Put a ledger where there is none; returns whether there was none.

        Storages that can decide this themselves do, so that of two runs that begin at once one alone succeeds: S3, and
        what follows it in conditional writes. In a folder of this machine a second name for a file does, where it can
        have one. For others fsspec looks first, or this does.
        """
        try:
            if self._is_local:
                self._name_first(self._write_beside(LEDGER, data), LEDGER)
            else:
                self._filesystem.pipe_file(f"{self._root}{LEDGER}", data, mode="create")
        except FileExistsError:
            return False
        except (NotImplementedError, TypeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_CONDITIONS:
                raise  # it says nothing of the condition, so the next try has it again
            if LEDGER in self.sizes():
                return False
            self.write_ledger(data)
        return True

    def put(self, file: Path, path: str) -> None:
        """Bring a file to `path` below `checkpoints`."""
        if self._is_local:
            temporary = self._beside(path)
            self._files.make_folder(temporary.parent)
            self._files.remove(temporary)
            self._filesystem.put_file(str(file), str(temporary))
            self._files.sync_file(temporary)
            self._put_in_place(temporary, path)
            return
        options = {"chunksize": part_bytes(file.stat().st_size)} if "s3" in self._filesystem.protocol else {}
        self._filesystem.put_file(str(file), f"{self._root}{path}", **options)

    def get(self, path: str, file: Path) -> None:
        """Bring what is at `path` below `checkpoints` to a file."""
        self._filesystem.get_file(f"{self._root}{path}", str(file))

    def size(self, path: str) -> int:
        """The bytes of what is at `path` below `checkpoints`."""
        return int(self._filesystem.size(f"{self._root}{path}"))

    def remove(self, path: str) -> None:
        """Remove what is at `path` below `checkpoints`."""
        self._filesystem.rm_file(f"{self._root}{path}")

    def remove_empty_folders(self) -> None:
        """Remove folders of snapshots that have no file any more. Only storages on this machine have folders."""
        if self._is_local:
            snapshots = Path(f"{self._root}{SNAPSHOTS}")
            for folder in (Path(path) for path, *_ in os.walk(snapshots, topdown=False)):
                if folder != snapshots and not any(folder.iterdir()):
                    folder.rmdir()

    def is_at(self, folder: Path) -> bool:
        """Whether this is where `folder`, a `checkpoints` of this machine, is."""
        return self._is_local and Path(self._root).resolve() == folder.resolve()

    def _beside(self, path: str) -> Path:
        place = Path(f"{self._root}{path}")
        return place.with_name(f"{TEMPORARY}{place.name}")

    def _write_beside(self, path: str, data: bytes) -> Path:
        temporary = self._beside(path)
        self._files.make_folder(temporary.parent)
        self._files.remove(temporary)
        with self._files.create(temporary) as file:
            file.write(data)
            file.sync()
        return temporary

    def _put_in_place(self, temporary: Path, path: str) -> None:
        self._files.rename(temporary, Path(f"{self._root}{path}"))
        self._files.sync_folder(temporary.parent)

    def _name_first(self, temporary: Path, path: str) -> None:
        try:
            Path(f"{self._root}{path}").hardlink_to(temporary)
        finally:
            self._files.remove(temporary)
        self._files.sync_folder(temporary.parent)


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import split_protocol, url_to_fs  # comes with torch, but only remote runs need it
    except ImportError as error:
        raise ConfigError("a remote storage needs fsspec, and a package for its kind: keepbest[s3]") from error
    if without_passwords(url) != url:
        # The config of a run, its lock and the messages of other libraries would hold it.
        raise ConfigError(
            f"expected a URL without a password, got {url!r}: leave it out, and set it in the environment as fsspec "
            "reads it, such as AWS_SECRET_ACCESS_KEY, or FSSPEC_SFTP_PASSWORD for sftp://"
        )
    protocol, path = split_protocol(url)
    if not protocol or not path.strip("/ "):  # often a variable that is not set, which would be a place all the same
        raise ConfigError(f"expected the URL of a run, like s3://bucket/runs/a, got {url!r}")
    try:
        # Object stores have no folders to be made; local ones do.
        return url_to_fs(url, **({"auto_mkdir": True} if protocol in ("file", "local") else {}))  # type: ignore[no-any-return]
    except (ImportError, ValueError, OSError) as error:  # some storages are contacted to open a URL
        hint = ": pip install 'keepbest[s3]'" if protocol in ("s3", "s3a") else ""
        raise ConfigError(f"{url} cannot be opened: {error}{hint}") from error


def part_bytes(size: int) -> int:
    """The bytes of each part in which S3 is given a file of `size` bytes."""
    return max(_PART_BYTES, math.ceil(size / _MOST_PARTS))


def snapshot_in(path: str) -> str | None:
    """Name of the snapshot that a path below `checkpoints` is in; `None` if it is in none."""
    parts = path.split("/")
    return parts[1] if len(parts) > 2 and parts[0] == SNAPSHOTS else None
