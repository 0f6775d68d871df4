"""What the snippets of a page need and do not show. A page without an entry needs nothing."""

from __future__ import annotations

# {page: what runs before its first block}
BEFORE_THE_PAGE = {
    "README.md": """
import torch

model = torch.nn.Linear(8, 1)
losses = iter([3.0, 2.0, 2.5, 2.4, 2.3, 1.0, *[1.5] * 14])


def train_one_epoch(model):
    torch.nn.init.normal_(model.weight)


def evaluate(model):
    return next(losses), 64
""",
    "docs/coming-from.md": """
import torch

model, rank, best_loss, val_loss = torch.nn.Linear(8, 1), 0, float("inf"), 3.0


def train_one_epoch(model):
    torch.nn.init.normal_(model.weight)


def evaluate(model):
    return float(model.weight.square().mean()), 64
""",
    "docs/remote.md": """
import os

import boto3
import torch
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:{}".format(server.get_host_and_port()[1])
os.environ.update(AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_DEFAULT_REGION="us-east-1")
boto3.client("s3").create_bucket(Bucket="bucket")
model, val_loss = torch.nn.Linear(8, 1), 1.0
""",
    "docs/reading.md": """
import torch

from keepbest import BestKeeper

model = torch.nn.Linear(4, 1)
with BestKeeper(model, directory="runs/a", metric_key="loss/val/total", tolerances=[2], keep_top_k=3) as keeper:
    for epoch, value in enumerate([3.0, 2.0, 2.5, 1.0, 1.5], start=1):
        torch.nn.init.constant_(model.weight, epoch)
        keeper.observe(value, epoch=epoch)
""",
    "docs/loggers.md": """
import os

import torch

os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false")
os.environ.update({f"WANDB_{kind}_DIR": os.path.abspath(kind) for kind in ("DATA", "CACHE", "CONFIG")})
os.environ.update(MLFLOW_TRACKING_URI="sqlite:///mlflow.db", MLFLOW_DISABLE_TELEMETRY="true")
os.makedirs("runs")
model = torch.nn.Linear(8, 1)


def train_one_epoch(model):
    torch.nn.init.normal_(model.weight)


def evaluate(model):
    return float(model.weight.square().mean())
""",
    "docs/own-loop.md": """
import torch

import keepbest

model = torch.nn.ModuleDict(
    {"encoder": torch.nn.Linear(8, 4), "head": torch.nn.ModuleDict({"classifier": torch.nn.Linear(4, 2)})}
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
settings = {"directory": "runs/settings", "metric_key": "loss/val/total"}


def train_one_epoch(model):
    torch.nn.init.normal_(model["encoder"].weight)


def evaluate(model):
    return float(model["encoder"].weight.square().mean())
""",
}

# {page: {heading: what runs before each of the blocks under it}}
BEFORE_A_BLOCK = {
    "docs/own-loop.md": {
        "Tolerances": [
            """
keeper = BestKeeper(model, directory="runs/b", metric_key="loss/val/total", tolerances=[2, 5])
val_loss, iteration = 0.5, TrainingIteration(epoch=1)
"""
        ],
        "Metrics of torchmetrics, and functions": [
            """
from torchmetrics import MeanMetric

keeper = BestKeeper(model, directory="runs/c", metric_key="loss/val/total")
metric = MeanMetric()
metric.update(0.5)
"""
        ],
        "Resuming after a stop": [
            """
keeper = BestKeeper(model, directory="runs/a", metric_key="loss/val/total", resume="ledger")
keeper.start(at=TrainingIteration(epoch=5))
""",
            """
keeper.abandon()  # the process ends
""",
        ],
        "Signals": [
            """
import os, signal

keeper = BestKeeper(model, directory="runs/d", metric_key="loss/val/total")
batches = [(TrainingIteration(update=number), number) for number in range(1, 10)]
saved = []
save_checkpoint = saved.append


def train_on(batch):
    if batch == 3:
        os.kill(os.getpid(), signal.SIGTERM)
"""
        ],
    },
}

# {page: packages that its blocks of Python need, and that are not in every environment}
NEEDS = {"docs/loggers.md": ("wandb", "mlflow")}

# {page: {heading: the error that the block under it ends with}}
ENDS_WITH = {"docs/own-loop.md": {"Signals": "PreemptedError"}}
