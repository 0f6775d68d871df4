from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from keepbest.cli.run_file import RunFile, parse_settings
from keepbest.errors import ConfigError
from tests.kit import cli_runs as runs
from tests.kit.toys import AutoEncoder

STOPPER = {"name": "MetricEarlyStopper", "metric_key": "loss", "tolerance": 1, "every_n_epochs": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("1e-3", 0.001), ("2.5E+2", 250.0), ("[1, 3]", [1, 3]), ("null", None), ("a=b", "a=b"), ("1.5", 1.5)],
)
def test_values_of_settings_are_yaml(text, value):
    assert parse_settings([f"some.key={text}"]) == {"some.key": value}


@pytest.mark.parametrize("argument", ["trainer.epochs", "=3", "trainer..epochs=3", "key=[1"])
def test_malformed_setting_is_refused(argument):
    with pytest.raises(ConfigError, match=r"YAML|expected a setting"):
        parse_settings([argument])


def test_settings_replace_those_of_the_file_at_any_depth(tmp_path):
    path = runs.write_config(tmp_path / "c.yaml", runs.describe_run(tmp_path, epochs=1))
    run = RunFile.read(
        path, {"trainer.epochs": 3, "seed": 5, "trainer.callbacks.1.tolerances": [7], "model.dropout": 0.5}
    )
    assert run.config.trainer.epochs == 3
    assert run.config.seed == 5
    assert run.config.trainer.callbacks[1].tolerances == [7]
    assert run.config.build_model().encoder[2].p == 0.5


def test_saved_config_is_the_same_run(tmp_path):
    path = runs.write_config(tmp_path / "c.yaml", runs.describe_run(tmp_path / "run", epochs=1))
    run = RunFile.read(path, {"trainer.epochs": 3, "optimizer.lr": 1e-7})
    run.save()
    again = RunFile.read(tmp_path / "run" / "config.yaml", {})
    assert again == run
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("trianer.epochs", "there is no setting 'trianer'; did you mean 'trainer'"),
        ("trainer.epoch", "trainer: there is no setting 'epoch'; did you mean 'epochs'"),
        (
            "trainer.callbacks.1.tolerance",
            "trainer.callbacks.1: there is no setting 'tolerance'; did you mean 'tolerances'",
        ),
        (
            "trainer.callbacks.1.eval_callbacks.0.dataset",
            "trainer.callbacks.1.eval_callbacks.0: there is no setting 'dataset'; did you mean 'dataset_key'",
        ),
        ("trainer.callbacks.7.tolerances", "'7' must be the number of one of 2 items"),
        ("seed.x", "seed is 12 and has no keys"),
        ("existing", "there is no setting 'existing'. The settings are: directory, seed, model"),
        ("zzzz", "there is no setting 'zzzz'. The settings are: directory, seed, model"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest(key, hint, tmp_path):
    content = runs.describe_run(tmp_path, epochs=1)
    content["trainer"]["callbacks"][1]["eval_callbacks"] = [runs.evaluation()]
    path = runs.write_config(tmp_path / "c.yaml", content)
    with pytest.raises(ConfigError) as error:
        RunFile.read(path, {key: 1})
    assert hint in str(error.value)
    assert "pydantic" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "line.Line", "model must be a mapping with a kind, found 'line.Line'"),
        ("directory", None, "directory must be a path, found None"),
        ("trainer.callbacks.1", None, "trainer.callbacks.1: expected a mapping with a kind or a name; found None"),
        ("trainer.callbacks.1.on_new_best", "print", "trainer.callbacks.1.on_new_best must be a list, found 'print'"),
        ("seed", 2**64, "seed must be less than 9223372036854775808"),
        ("seed", True, "seed must be a valid integer, found True"),
        ("num_workers", "2", "num_workers must be a valid integer, found '2'"),
        ("directory", "", "directory: expected a path, got an empty text, ''"),
        ("directory", " ", "directory: expected a path, got an empty text, ' '"),
        ("data", ["train"], "data must be a mapping, found ['train']"),
        ("trainer", None, "trainer must be a mapping of settings, found None"),
        ("trainer.clip_grad_norm", True, "trainer.clip_grad_norm must be a valid number, found True"),
        ("trainer.rank_timeout", 1e300, "trainer.rank_timeout must be less than or equal to 1000000000, found 1e+300"),
        ("trainer.callbacks", None, "trainer.callbacks must be a list, found None"),
        ("trainer.callbacks.1.tolerances", "1,3", "tolerances must be a list such as [2, 5], found '1,3'"),
        (
            "trainer.callbacks.1.model_names",
            "encoder",
            "model_names must be a list such as ['encoder'], found 'encoder'",
        ),
        ("trainer.callbacks.1.id", " ", "trainer.callbacks.1.id must be a name or absent, found ' '"),
        ("trainer.callbacks.1", STOPPER | {"patience": 1}, "no setting 'patience'; did you mean 'tolerance'?"),
        ("trainer.callbacks.1", STOPPER | {"higher_is_better": "no"}, "higher_is_better must be true (higher values"),
        ("trainer.callbacks.1", STOPPER | {"min_delta": True}, "min_delta must be a valid number, found True"),
        ("trainer.callbacks.1", {"kind": "..Best"}, "kind '..Best' is not a dotted path like package.module.Name"),
    ],
)
def test_wrong_value_is_refused_in_the_words_of_the_file(key, value, message, tmp_path):
    path = runs.write_config(tmp_path / "c.yaml", runs.describe_run(tmp_path, epochs=1))
    with pytest.raises(ConfigError) as error:
        RunFile.read(path, {key: value})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("5: 3\n", "a key must be a text, found 5; put it in quotes"),
        ("data: {on: {kind: tests.kit.toys.Waves, length: 8}}\n", "data: a key must be a text, found True; put it in"),
    ],
)
def test_key_that_is_no_text_is_refused(more, message, tmp_path):
    content = runs.describe_run(tmp_path, epochs=1)
    del content["data"]
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(content) + more)
    with pytest.raises(ConfigError) as error:
        RunFile.read(path, {})
    assert message in str(error.value)


@pytest.mark.parametrize(
    "more", ["seed: 3\n", "trainer: {epochs: 1}\n", "schedule: {kind: a.B, gamma: 1, 'gamma': 2}\n"]
)
def test_key_that_is_there_twice_is_refused(more, tmp_path):
    path = runs.write_config(tmp_path / "c.yaml", runs.describe_run(tmp_path, epochs=1))
    first = more.partition("gamma")[1] or more.partition(":")[0]
    path.write_text(path.read_text() + more)
    with pytest.raises(ConfigError, match=rf"c\.yaml: .*(?s:.*)'{first}' is there twice(?s:.*)line \d+, column \d+"):
        RunFile.read(path, {})


def test_merged_key_may_be_replaced(tmp_path):
    path = runs.write_config(tmp_path / "c.yaml", runs.describe_run(tmp_path, epochs=1))
    merged = "schedule: {kind: a.B, base: &b {gamma: 1, step: 2}, one: &c {<<: *b, gamma: 3}, two: {<<: *c, step: 4}}\n"
    path.write_text(path.read_text() + merged)
    schedule = RunFile.read(path, {}).config.schedule
    assert schedule.model_extra["two"] == {"gamma": 3, "step": 4}


@pytest.mark.parametrize("text", ["- a list", "a: [", "just text", ""])
def test_file_that_describes_no_run_is_refused(text, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        RunFile.read(path, {})


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the config [^ ]*no\.yaml: No such file or directory$"):
        RunFile.read(tmp_path / "no.yaml", {})


def test_learning_rate_without_a_point_is_a_number(tmp_path):
    path = tmp_path / "c.yaml"
    text = yaml.safe_dump(runs.describe_run(tmp_path, epochs=1))
    path.write_text(text.replace("lr: 0.3", "lr: 3e-1"))
    assert RunFile.read(path, {}).config.optimizer.model_extra["lr"] == 0.3


ALIASES = """
directory: {directory}
model: {{kind: tests.kit.toys.AutoEncoder}}
optimizer: {{kind: torch.optim.SGD, lr: 0.1}}
data:
  train: &waves {{kind: tests.kit.toys.Waves, length: 8}}
  val: *waves
trainer:
  effective_batch_size: 4
  epochs: 1
  callbacks:
  - &best {{name: BestCheckpointCallback, every_n_updates: 1, metric_key: loss/a, tolerances: [1, 2]}}
  - {{<<: *best, metric_key: loss/b}}
"""


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [
        ("data.val.length", 2, "data.train.length"),
        ("data.train.length", 2, "data.val.length"),
        ("trainer.callbacks.0.tolerances.1", 7, "trainer.callbacks.1.tolerances.1"),
        ("trainer.callbacks.1.tolerances.1", 7, "trainer.callbacks.0.tolerances.1"),
    ],
)
def test_setting_changes_one_place_that_has_an_alias(key, value, other, tmp_path):
    def at(content, dotted):
        for name in dotted.split("."):
            content = content[int(name) if name.isdecimal() else name]
        return content

    path = tmp_path / "c.yaml"
    path.write_text(ALIASES.format(directory=tmp_path))
    before, after = RunFile.read(path, {}).content, RunFile.read(path, {key: value}).content
    assert (at(after, key), at(after, other)) == (value, at(before, other))


@pytest.mark.parametrize(
    ("text", "kind"), [("2026-02-30", "timestamp"), ("0x_", "int"), ("!!bool maybe", "bool"), ("!!int a", "int")]
)
def test_value_that_is_not_what_it_looks_like_is_placed(text, kind, tmp_path):
    path = runs.write_config(tmp_path / "c.yaml", runs.describe_run(tmp_path, epochs=1))
    path.write_text(path.read_text() + f"schedule: {{kind: a.B, since: {text}}}\n")
    with pytest.raises(ConfigError, match=rf"c\.yaml: this is no {kind}: .*(?s:.*)line \d+, column 30"):
        RunFile.read(path, {})
    with pytest.raises(ConfigError, match=rf"the value of seed is not YAML: '{text}': this is no {kind}"):
        parse_settings([f"seed={text}"])


def test_ranks_agree_on_a_config_with_keys_of_any_kind(tmp_path):
    labels = {1: "cat", "rest": "dog", None: {"of", "any", "kind"}}
    content = runs.describe_run(tmp_path / "run", epochs=1, strategy="ddp")
    content["model"] = {"kind": "tests.cli.test_run_file.Labelled", "labels": labels}
    config = runs.write_config(tmp_path / "c.yaml", content)
    runs.succeeded(runs.train_on_ranks(2, config))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["labels"] == labels


class Labelled(AutoEncoder):
    """A model whose config has names for its classes."""

    def __init__(self, labels):
        super().__init__()
        self.labels = labels


def test_config_is_utf_8_for_a_process_of_any_locale(tmp_path):
    path = tmp_path / "c.yaml"
    content = runs.describe_run(tmp_path, epochs=1) | {"schedule": {"kind": "a.B", "name": "größe"}}
    path.write_bytes(yaml.safe_dump(content, allow_unicode=True).encode())
    code = "import sys; from pathlib import Path; from keepbest.cli.run_file import RunFile\n"
    code += "print(ascii(RunFile.read(Path(sys.argv[1]), {}).content['schedule']['name']))"
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(path)]
    ended = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert ended.stdout == "'gr\\xf6\\xdfe'\n", ended.stderr


@pytest.mark.parametrize("second", ["trainer.epochs=4", "trainer.epochs=3"])
def test_setting_that_is_given_twice_is_refused(second):
    with pytest.raises(ConfigError, match=f"trainer.epochs is given twice, as 'trainer.epochs=3' and as '{second}'"):
        parse_settings(["trainer.epochs=3", "seed=1", second])
