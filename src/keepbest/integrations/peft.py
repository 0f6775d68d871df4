"""`export_adapter`: the best weights of an adapter of PEFT, as `PeftModel.from_pretrained` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from keepbest.errors import ConfigError, SnapshotError
from keepbest.export import export
from keepbest.remote.storage import local_path
from keepbest.run.files import Files
from keepbest.run.layout import TEMPORARY

_files = Files()


def export_adapter(run: Path | str, ref: str, to: Path | str, model: Any, *, adapter_name: str = "default") -> Path:
    """Write the weights that `ref` names with `save_pretrained` of PEFT, verified before. **Rank-local**.

    The model is not changed, and need not hold these weights. It says which adapters there are, and of what kind.

    Args:
        run: Directory of the run, or the URL of its remote copy.
        ref: Name of the ref, for example `best_model.eval_loss`.
        to: Folder to write. It must not exist.
        model: A `peft.PeftModel` with the adapter: the one that was trained, or one that was made like it.
        adapter_name: Name of the adapter in the model. Any but `default` is in a folder of its name in `to`, as PEFT
            writes it.

    Returns:
        The folder that `PeftModel.from_pretrained` reads.

    Raises:
        ConfigError: If there is something at `to`, or the model has no such adapter, or one that learns a prompt.
        SnapshotError: If there is no such run or ref, a file is missing or damaged, or it has not the whole adapter.
        OSError: Any refusal of the file system. Nothing is left at `to` then.
    """
    to = local_path(to)
    if to.exists():
        raise ConfigError(f"{to} exists; nothing is overwritten")
    adapters = getattr(model, "peft_config", {})
    if adapter_name not in adapters:
        known = ", ".join(adapters) or "none: expected a PeftModel"
        raise ConfigError(f"the model has no adapter {adapter_name!r}; there are: {known}")
    if getattr(adapters[adapter_name], "is_prompt_learning", False):
        raise ConfigError(
            f"PEFT writes the adapter {adapter_name!r}, which learns a prompt, from the model alone: load the best "
            "into the model with keepbest.load, and call its save_pretrained"
        )
    folder = to.with_name(f"{TEMPORARY}{to.name}")
    weights = folder / "weights.pt"
    _files.remove(folder)
    try:
        export(run, ref, weights)
        state = torch.load(weights, mmap=True, weights_only=True)
        _check_is_whole(state, model, adapter_name, ref)
        model.save_pretrained(str(folder), selected_adapters=[adapter_name], state_dict=state)
        _files.remove(weights)
        for path in folder.rglob("*"):
            (_files.sync_folder if path.is_dir() else _files.sync_file)(path)
        _files.sync_folder(folder)
        _files.rename(folder, to)
        _files.sync_folder(to.parent)
    finally:
        _files.remove(folder)
    return to if adapter_name == "default" else to / adapter_name


def _check_is_whole(state: dict[str, Any], model: Any, adapter_name: str, ref: str) -> None:
    """PEFT would write what is there, and read the rest as it was initialized."""
    mine = {name for name, _ in model.named_parameters() if adapter_name in name.split(".")}
    missing = sorted(mine - state.keys())
    if missing or not mine & state.keys():
        raise SnapshotError(
            f"expected the weights of the adapter {adapter_name!r} in {ref}, but it has not {len(missing)} of them, "
            f"such as {', '.join(missing[:3]) or 'any'}; was it trained with another adapter, or another kind of it?"
        )
