"""`export_checkpoint`: a best as a checkpoint that Lightning loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from keepbest.capture.selection import Selection
from keepbest.errors import ConfigError
from keepbest.export import verified_contents, write_contents
from keepbest.formats import torch_file
from keepbest.integrations.lightning_packages import VERSION
from keepbest.modules.kinds import is_dtensor
from keepbest.modules.state_dicts import UNRECORDED, paths_above, versioned_for
from keepbest.modules.wrappers import PlainNames
from keepbest.remote.download import every_file, snapshot_of
from keepbest.remote.live import read_snapshots
from keepbest.remote.storage import local_path
from keepbest.run.appearing import appearing
from keepbest.run.files import Files
from keepbest.run.history import History
from keepbest.run.manifest import Manifest
from keepbest.run.place import check_can_be_made
from keepbest.run.reader import find_ref
from keepbest.user_code import code_of_the_user

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

_files = Files()


def export_checkpoint(run: Path | str, ref: str, to: Path | str, module: LightningModule) -> Path:
    """Write the weights that `ref` names as a checkpoint of Lightning, verified before. **Rank-local**.

    `Module.load_from_checkpoint(to)` loads it, and so does `ckpt_path=to` of `trainer.test`, `validate` and `predict`.
    It holds no optimizer, so `fit` does not resume from it. The module gives its hyperparameters, and what its hook
    `on_save_checkpoint` adds, but no weights, except frozen ones that the run left out (`save_frozen_weights=False`).

    Args:
        run: Directory of the run, or the URL of its remote copy.
        ref: Name of the ref, for example `best_model.loss.val`.
        to: File to write. It must not exist.
        module: Module that was trained, or one that was made like it.

    Returns:
        The file.

    Raises:
        ConfigError: If there is a file already, or one in the place of its folder, or the run kept parts of the module
            alone (`model_names`), or left out a weight that the module has not frozen.
        SnapshotError: If there is no such run or ref, or a file is missing or damaged.
        RankFailedError: If the hook of the module raises an `OSError`.
        OSError: Any refusal of the file system. Nothing is left at `to` then.
    """
    to = local_path(to, "to")
    if to.exists():
        raise ConfigError(f"{to} exists; nothing is overwritten")
    check_can_be_made(to.parent)
    with appearing(to, _files) as written:
        _write(written, run, ref, module)
    return to


def _write(to: Path, run: Path | str, ref: str, module: LightningModule) -> None:
    weights = to.with_name(f"{to.name}.pt")
    manifest = _export_whole(run, ref, weights)
    # Mapped from the file, so that they take no memory.
    state = torch.load(weights, mmap=True, weights_only=True)
    content = {"state_dict": _as_in(module, state, manifest), **_around(manifest, module)}
    torch_file.FORMAT.write_file(_files, to, content, is_waited_for=True)


def _export_whole(run: Path | str, ref: str, to: Path) -> Manifest:
    def read(directory: Path, history: History) -> Manifest:
        found = find_ref(directory, history, ref)
        parts = [part.name for part in found.manifest.saved_parts if part.path]
        if parts:
            raise ConfigError(
                f"expected the weights of a whole LightningModule, but {ref} has its parts {', '.join(parts)} alone "
                "(model_names); load it with keepbest.load"
            )
        write_contents(to, verified_contents(found, None, Selection.of(None)))
        return found.manifest

    return read_snapshots(run, snapshot_of(ref), read, files=every_file)


def _as_in(module: LightningModule, saved: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """The saved weights by the names in the module, with what of it was not saved. It is no state dict of FSDP's."""
    names = PlainNames(module)
    state = {names.key(plain): value for plain, value in saved.items()}
    parameters = {names.plain(key): value for key, value in module.named_parameters(remove_duplicate=False)}
    for plain in (plain for keys in manifest.left_out.values() for plain in keys):
        value = parameters.get(plain)
        if value is None or value.requires_grad or is_dtensor(value):
            found = "is not in the module" if value is None else "trains" if value.requires_grad else "is sharded"
            raise ConfigError(
                f"{plain} was frozen, and save_frozen_weights=False left it out of what is kept. A checkpoint of "
                f"Lightning has all weights, but it {found} now: load the best with keepbest.load"
            )
        state[names.key(plain)] = value.detach()
    buffers = dict(module.named_buffers(remove_duplicate=False))
    # Of an average in the module: of how many weights it is one.
    state |= {key: buffer for key, buffer in buffers.items() if not names.plain_state({key: buffer})}
    if manifest.versions is None:
        return state
    versions = dict.fromkeys(paths_above(saved), UNRECORDED) | dict(manifest.versions.get("model", {}))
    return versioned_for(module, state, versions)


def _around(manifest: Manifest, module: LightningModule) -> dict[str, Any]:
    """What Lightning has in a checkpoint beside weights, where it saves weights only."""
    iteration = manifest.iteration
    around: dict[str, Any] = {
        "epoch": iteration.epoch or 0,
        "global_step": iteration.update or 0,
        "pytorch-lightning_version": VERSION,
    }
    if module.hparams:
        # The name of the argument that had them all, where there was one. Lightning has no other way to it.
        around[module.CHECKPOINT_HYPER_PARAMS_NAME] = getattr(module, "_hparams_name", None)
        is_plain = isinstance(module.hparams, dict)
        around[module.CHECKPOINT_HYPER_PARAMS_KEY] = dict(module.hparams) if is_plain else module.hparams
        if not is_plain:  # those of OmegaConf
            around[module.CHECKPOINT_HYPER_PARAMS_TYPE] = type(module.hparams)
    with code_of_the_user("on_save_checkpoint() of the module"):
        module.on_save_checkpoint(around)
    return around
