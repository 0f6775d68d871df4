"""What counts as another spelling of a metric: metrics that are in use side by side do not."""

from __future__ import annotations

import pytest

from keepbest.misspelling import misspelt


@pytest.mark.parametrize(
    ("key", "logged"),
    [
        ("val/loss", "val_loss"),
        ("valLoss", "val_loss"),
        ("Val-mAP", "val/map"),
        ("loss/val", "val/loss"),
        ("valid_loss", "val_loss"),
        ("val_los", "val_loss"),
        ("vall_loss", "val_loss"),
        ("val_accurcy", "val_accuracy"),
        ("val_loss", "val_loss/dataloader_idx_0"),
    ],
)
def test_another_spelling_of_a_logged_metric_is_found(key, logged):
    assert misspelt(key, ["epoch", logged, "lr"]) == logged


@pytest.mark.parametrize(
    ("key", "logged"),
    [
        ("train_loss", "val_loss"),
        ("loss", "val_loss"),
        ("val_loss_epoch", "val_loss"),
        ("val_rmse", "val_mse"),
        ("val_mae", "val_mse"),
        ("val_miou", "val_iou"),
        ("val_rougel", "val_rouge"),
        ("val_acc5", "val_acc1"),
        ("map_100", "map_1000"),
        ("val_loss_a", "val_loss_b"),
        ("text_to_image_recall", "image_to_text_recall"),
        ("en_de", "de_en"),
        ("val_loss_head", "val_loss_heads"),
        ("val_1_1", "val_11"),
    ],
)
def test_another_metric_is_no_misspelling(key, logged):
    assert misspelt(key, ["epoch", logged, "lr"]) is None
