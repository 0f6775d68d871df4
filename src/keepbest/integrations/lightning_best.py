"""How a trainer of Lightning finds the best of a `BestCheckpoint` as its own: what `ckpt_path="best"` names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keepbest.integrations.lightning_export import export_checkpoint
from keepbest.integrations.lightning_packages import CHECKPOINTS, Checkpoint, monitors
from keepbest.keeper import BestKeeper

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class BestAsCheckpoint:
    """The best of one `fit` as a checkpoint of Lightning, in the directory of its run. **Rank-local**.

    Rank 0 writes it when it is first asked for. Other ranks know its name alone.

    Args:
        keeper: Keeper of the best.
        module: Module that is trained.
        trainer: Trainer of this `fit`.
    """

    def __init__(self, keeper: BestKeeper, module: LightningModule, trainer: Trainer) -> None:
        self._keeper = keeper
        self._module = module
        self._is_rank_0, self._is_alone = trainer.is_global_zero, trainer.world_size == 1
        self._is_asked_for = False

    def write(self) -> str:
        """Write it on rank 0, unless it is there. Returns its path, which is empty before there is a best.

        Raises:
            KeepBestError: As `export_checkpoint`.
        """
        path = self._path()
        if path is not None and self._is_rank_0 and not path.exists():
            export_checkpoint(self._keeper.directory, self._keeper.name, path, self._module)
        return str(path or "")

    def ask(self) -> str:
        """As `write`, but where other ranks would wait for rank 0, `write_if_asked` writes it."""
        self._is_asked_for = True
        return self.write() if self._is_alone else str(self._path() or "")

    def write_if_asked(self) -> None:
        """Write what has been asked for since the last time. Raises as `write`."""
        if self._is_asked_for:
            self.write()
        self._is_asked_for = False

    def _path(self) -> Path | None:
        if self._keeper.best_path is None:
            return None
        # Another best is another file, and so is that of another run, since what was set aside has left its own here.
        best = f"{self._keeper.best_path.name}.{str(self._keeper.state_dict()['run_id'])[:8]}"
        return self._keeper.directory / f"{self._keeper.name}={best}.ckpt"


class BestOfTrainer(Checkpoint):
    """Stands among the callbacks of a trainer, where it looks for its best.

    The trainer takes the first of its checkpoint callbacks, by their class. It also calls those last, and where it is
    made with one it adds none itself. So this one has no hook, and comes when the trainer was made.
    """

    def __init__(self, find_path: Callable[[], str], replaced: Any) -> None:
        self.find_path = find_path
        self._replaced = replaced

    @property
    def best_model_path(self) -> str:
        return self.find_path()

    def __getattr__(self, name: str) -> Any:
        """What else is asked of `trainer.checkpoint_callback` is what it was before, such as `last_model_path`."""
        replaced = self.__dict__.get("_replaced")
        if replaced is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(replaced, name)


def show_to(trainer: Trainer, find_path: Callable[[], str], *, instead_of: Callable[[], str] | None = None) -> None:
    """Let `ckpt_path="best"` be this path, unless a callback that monitors a metric has a best already.

    So is another path that was shown before, unless it is to be shown `instead_of` that one.
    """
    if "MultiProcessing" in type(trainer.strategy.launcher).__name__:
        return  # a process that ends after this: the path would go back to another callback, which takes it for its own
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    checkpoints = [each for each in callbacks if isinstance(each, CHECKPOINTS)]
    shown = [each for each in checkpoints if isinstance(each, BestOfTrainer)]
    for each in shown:
        each.find_path = find_path if each.find_path == instead_of else each.find_path
    if shown or any(monitors(each) for each in checkpoints):
        return
    place = callbacks.index(checkpoints[0]) if checkpoints else len(callbacks)
    # A new list: the trainer is going through the old one.
    best = BestOfTrainer(find_path, checkpoints[0] if checkpoints else None)
    trainer.callbacks = [*callbacks[:place], best, *callbacks[place:]]  # type: ignore[attr-defined]
