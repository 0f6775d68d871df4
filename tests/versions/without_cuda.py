"""Lets a build of torch for CUDA be imported without the libraries of CUDA, which take three times its size.

The small one that looks for GPUs is the real one. Each of the others is replaced by one whose functions all answer that
there is no device.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

_REPLACED = re.compile(r"lib(cu(?!da)|nccl|nv)\w*\.so\.\d+")
_NOT_NEEDED = re.compile("Requires-Dist: (nvidia(?!-cuda-runtime)|cuda-bindings|triton)")
_NO_DEVICE = 100  # cudaErrorNoDevice, and CUDA_ERROR_NO_DEVICE


def replace_cuda(packages: Path) -> None:
    """Change the torch in a folder of packages, if it is a build for CUDA, so that it needs little of CUDA."""
    libraries = sorted((packages / "torch" / "lib").glob("*.so"))
    wanted = {name for path in libraries for name in _needed(path) if _REPLACED.fullmatch(name)}
    functions = _missing_functions(libraries)
    versions = _versions(libraries)
    for name in sorted(wanted):
        _make_library(libraries[0].parent / name, {each: functions[each] for each in versions[name] or [""]})
    [described] = packages.glob("torch-*.dist-info/METADATA")
    lines = described.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = "".join(line for line in lines if not _NOT_NEEDED.match(line))
    described.write_text(re.sub(r"cuda-toolkit\[.*?\]", "cuda-toolkit[cudart]", kept), encoding="utf-8")


def _needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.*)\]", _printed("readelf", "--dynamic", "--wide", library))


def _missing_functions(libraries: list[Path]) -> Mapping[str, set[str]]:
    """Names that are used and not defined, by their version; those without one have the version ''."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path in libraries:
        for name, version in re.findall(
            r" U (cu\w+|nccl\w+|nv\w+|__cuda\w+)(?:@(\S+))?", _printed("nm", "--dynamic", "--undefined-only", path)
        ):
            found[version].add(name)
    return found


def _versions(libraries: list[Path]) -> Mapping[str, set[str]]:
    """The versions of names that each library must define."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path in libraries:
        library = ""
        for file, version in re.findall(
            r"File: (\S+)|Name: (\S+)", _printed("readelf", "--version-info", "--wide", path)
        ):
            library = file or library
            if version:
                found[library].add(version)
    return found


def _make_library(path: Path, functions: Mapping[str, set[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        code, versions = Path(folder, "code.c"), Path(folder, "versions")
        code.write_text(
            "".join(f"int {name}() {{ return {_NO_DEVICE}; }}\n" for name in set().union(*functions.values()))
        )
        versions.write_text("".join(f"{version} {{ global: *; }};\n" for version in functions))
        _printed(
            "cc", "-shared", "-w", code, f"-Wl,-soname,{path.name}", f"-Wl,--version-script={versions}", "-o", path
        )


def _printed(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
