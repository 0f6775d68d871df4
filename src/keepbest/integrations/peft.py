"""`export_adapter`: the best weights of an adapter of PEFT, as `PeftModel.from_pretrained` reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model_state_dict

from keepbest.errors import ConfigError, SnapshotError
from keepbest.export import export
from keepbest.modules.kinds import has_shards
from keepbest.remote.storage import local_path
from keepbest.run.appearing import made_for, space_beside
from keepbest.run.files import Files

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
    to = local_path(to, "to")
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
    with made_for(to.parent), space_beside(to, _files) as space:
        folder = space / to.name
        _write(folder, run, ref, model, adapter_name)
        for path in folder.rglob("*"):
            (_files.sync_folder if path.is_dir() else _files.sync_file)(path)
        _files.sync_folder(folder)
        _files.rename(folder, to)
        _files.sync_folder(to.parent)
    return to if adapter_name == "default" else to / adapter_name


def _write(folder: Path, run: Path | str, ref: str, model: Any, adapter_name: str) -> None:
    weights = folder.with_name("weights.pt")
    export(run, ref, weights)
    state = torch.load(weights, mmap=True, weights_only=True)
    with _all_ranks(model.peft_config[adapter_name], state, adapter_name):
        state = _whole(state, model, adapter_name, ref)
        model.save_pretrained(str(folder), selected_adapters=[adapter_name], state_dict=state)


@contextmanager
def _all_ranks(adapter: Any, state: Mapping[str, Any], adapter_name: str) -> Iterator[None]:
    """Let PEFT write all ranks of AdaLoRA: those that it has chosen by now need not be those that the best had.

    Unless the model was made with fewer ranks than the settings say, from a file in which others were left out.
    """
    ranks = {len(weight) for name, weight in state.items() if name.endswith(f".lora_E.{adapter_name}")}
    if not isinstance(adapter, AdaLoraConfig) or ranks != {adapter.init_r}:
        yield
        return
    chosen, adapter.rank_pattern = adapter.rank_pattern, None
    try:
        yield
    finally:
        adapter.rank_pattern = chosen


def _whole(state: dict[str, Any], model: Any, adapter_name: str, ref: str) -> dict[str, Any]:
    """What PEFT is to write: the adapter in `state`, and what it writes of the base, which was not trained.

    It would write what it finds, and read the rest as it was initialized. So it should find in the snapshot what it
    writes of the model, which is not all that has the name of the adapter. It leaves this name out of the keys, except
    of weights of the base. These it wants, for example, for embeddings and heads that were resized.
    """
    wanted = get_peft_model_state_dict(model, adapter_name=adapter_name)
    try:
        found = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter_name)
    except KeyError as error:  # some kinds look for a weight of theirs by its name
        found = {}
        wanted[str(error.args[0])] = None
    base = {name: weight.detach() for name, weight in model.named_parameters() if name not in state}
    missing = sorted(wanted.keys() - found.keys() - base.keys())
    if missing or not found:
        raise SnapshotError(
            f"expected the weights of the adapter {adapter_name!r} in {ref}, but it has not {len(missing)} of them, "
            f"such as {', '.join(missing[:3]) or 'any'}; was it trained with another adapter, or another kind of it?"
        )
    # Of a model that is sharded no rank has them.
    of_base = {name: base[name] for name in wanted.keys() & base.keys()}
    return {**state, **{name: each for name, each in of_base.items() if each.numel() and not has_shards(each)}}
