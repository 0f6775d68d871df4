"""Programs of the system that some tests need."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping


def install(packages: Mapping[str, str]) -> None:
    """Install what is missing, as root on Debian.

    Args:
        packages: command -> the package that has it.

    Raises:
        RuntimeError: if something is missing and this is another system or user.
    """
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = {package for command, package in packages.items() if shutil.which(command, path=path) is None}
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise RuntimeError(f"these tests need the packages {sorted(missing)}: install them, or run as root on Debian")
    apt_get = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"]
    subprocess.run([*apt_get, "update"], check=True)
    subprocess.run([*apt_get, "install", "-y", "--no-install-recommends", *sorted(missing)], check=True)
