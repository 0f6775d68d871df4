"""`BestArtifact`: brings each new best to a run of MLflow and to its registry. A hook for `on_new_best`."""

from __future__ import annotations

import re
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

from keepbest.decision import Outcome
from keepbest.errors import ConfigError
from keepbest.run.reader import is_best_of_its_run

_NAME = re.compile(r"[\w\-. ]+")
_TAKEN = ErrorCode.Name(RESOURCE_ALREADY_EXISTS)


class BestArtifact:
    """Logs the files of each new best, and registers them as a version of one model, the best with the alias `best`.

    The files are among the artifacts of the run, in `<name>/<iteration>`. The metric `<name>` of the run has the values
    of all new bests. `mlflow.artifacts.download_artifacts("models:/<name>@best")` brings the best back.

    After a resume from before the best, a worse model gets a version, but not the alias.

    Args:
        name: Name of the registered model.
        run_id: Run to log to. `None` is the active one; rank 0 alone needs one.

    Raises:
        ConfigError: If not both a model and a metric can have this name.
    """

    def __init__(self, name: str, *, run_id: str | None = None) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                "expected a name of letters, digits, spaces, '_', '-' and '.', which MLflow takes for models and for "
                f"metrics, found {name!r}"
            )
        self._name, self._run_id = name, run_id

    def __call__(self, outcome: Outcome, path: Path) -> None:
        """Log a new best. **Rank-local**, on rank 0.

        Raises:
            ConfigError: If there is no run.
        """
        run_id, client, iteration = self._find_run(), mlflow.MlflowClient(), str(outcome.iteration)
        now = outcome.iteration
        step = next(each for each in (now.update, now.epoch, now.sample, now.batch) if each is not None)
        folder = f"{self._name}/{iteration}"
        client.log_artifacts(run_id, str(path), folder)
        client.log_metric(run_id, self._name, outcome.value, step=step)
        try:
            client.create_registered_model(self._name)
        except MlflowException as error:
            if error.error_code != _TAKEN:
                raise
        tags = {"iteration": iteration, "value": repr(outcome.value)}
        version = client.create_model_version(self._name, f"runs:/{run_id}/{folder}", run_id, tags=tags)
        if is_best_of_its_run(path):
            client.set_registered_model_alias(self._name, "best", version.version)

    def _find_run(self) -> str:
        if self._run_id is not None:
            return self._run_id
        if (run := mlflow.active_run()) is None:
            raise ConfigError(
                "no run of MLflow is active: call mlflow.start_run() on rank 0 before the first best, or pass run_id"
            )
        return str(run.info.run_id)
