"""One live process owns a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from pathlib import Path

from keepbest.errors import RunExistsError

_logger = logging.getLogger(__name__)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


class RunLock:
    """An advisory lock on a file in the run folder, held while this process lives.

    It is a POSIX record lock: the kernel drops it when the process dies, child processes (data loader workers) do not
    inherit it, and NFS carries it. A second lock of the same process on the same file would not be refused, so
    the keepers of a process share one `OpenRun`.

    Raises:
        RunExistsError: If another process holds it. The message names the process, if the file does.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                owner = os.read(self._descriptor, 4096).decode(errors="replace") or "unknown"
                self.release()
                raise RunExistsError(
                    f"{path.parent} is in use by another process ({owner}); "
                    "let it end, or choose another directory for this run"
                ) from error
            if error.errno not in _UNSUPPORTED:
                self.release()
                raise
            _logger.warning("%s: this file system has no locks; a second run in this folder would go unnoticed", path)
        owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, owner.encode(), 0)

    def release(self) -> None:
        """Release the folder. A second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
