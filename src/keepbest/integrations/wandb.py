"""`BestArtifact`: brings each new best to a run of Weights & Biases. A hook for `on_new_best`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import wandb

from keepbest.decision import Outcome
from keepbest.errors import ConfigError
from keepbest.run.reader import is_best_of_its_run

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run


class BestArtifact:
    """Logs the files of each new best as a version of one artifact, of which the best one has the alias `best`.

    Every version also has its iteration as an alias, and value and iteration as metadata. The summary of the run has
    the value and the iteration of the best, below the name of the artifact. wandb copies the files before this returns.

    After a resume from before the best, a worse model gets a version, but not the alias.

    Args:
        name: Name of the artifact.
        run: Run to log to. `None` is the one that `wandb.init` has started in this process; rank 0 alone needs one.

    Raises:
        ConfigError: If no artifact can have this name.
    """

    def __init__(self, name: str, *, run: Run | None = None) -> None:
        try:
            wandb.Artifact(name, type="model")  # which knows what it takes
        except (ValueError, TypeError) as error:
            raise ConfigError(f"expected the name of an artifact of wandb, found {name!r}: {error}") from error
        self._name, self._run = name, run

    def __call__(self, outcome: Outcome, path: Path) -> None:
        """Log a new best. **Rank-local**, on rank 0.

        Raises:
            ConfigError: If there is no run.
        """
        run = self._run or wandb.run
        if run is None:
            raise ConfigError(
                "no run of wandb is there: call wandb.init() on rank 0 before the first best, or pass run"
            )
        kept = {"value": outcome.value, "iteration": str(outcome.iteration)}
        artifact = wandb.Artifact(self._name, type="model", metadata=kept)
        artifact.add_dir(str(path))
        aliases = [str(outcome.iteration)]
        if is_best_of_its_run(path):
            aliases.append("best")
            run.summary.update({f"{self._name}/{key}": value for key, value in kept.items()})
        run.log_artifact(artifact, aliases=aliases)
