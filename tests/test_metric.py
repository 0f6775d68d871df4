from __future__ import annotations

import math
import struct
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keepbest import MetricPropertyProvider, TrainingIteration
from keepbest.errors import ConfigError, InvalidMetricError, MetricMismatchError, MissingMetricError
from keepbest.metric import LOG_REMEDY, agree_on_metric, read_scalar, read_value
from keepbest.ranks import Number, Ranks
from keepbest.reduction import reduce_numbers
from keepbest.training.log_writer import LoggedScalar
from tests.kit.pool import run_ranks

FINITE = st.floats(-1e150, 1e150)
WEIGHTS = st.floats(1e-6, 1e6)
AVERAGES = ["mean", "min", "max", "rank0", "identical"]


def numbers(values, weights=None):
    return [Number(*pair) for pair in zip(values, weights or [None] * len(values), strict=True)]


@given(st.lists(FINITE, min_size=1, max_size=5))
def test_unweighted_reductions(values):
    exact = sum(map(Fraction, values))
    assert reduce_numbers(numbers(values), "sum") == float(exact)
    assert reduce_numbers(numbers(values), "mean") == pytest.approx(float(exact / len(values)), rel=1e-15, abs=1e-300)
    assert reduce_numbers(numbers(values), "min") == min(values)
    assert reduce_numbers(numbers(values), "max") == max(values)


@given(st.lists(st.tuples(st.floats(0, 1e100), WEIGHTS), min_size=1, max_size=5))
def test_weights_count_in_mean_and_sum(pairs):
    values, weights = zip(*pairs, strict=True)
    exact = sum(Fraction(value) * Fraction(weight) for value, weight in pairs)
    held = numbers(values, weights)
    assert reduce_numbers(held, "sum") == pytest.approx(float(exact), rel=1e-14)
    assert reduce_numbers(held, "mean") == pytest.approx(float(exact / sum(map(Fraction, weights))), rel=1e-14)
    assert reduce_numbers(held, "max") == max(values)


@given(st.floats(allow_nan=False), st.lists(WEIGHTS, min_size=1, max_size=7), st.sampled_from(["mean", "min", "max"]))
def test_equal_values_reduce_to_exactly_that_value(value, weights, reduction):
    for given_weights in (weights, None):
        held = numbers([value] * len(weights), given_weights)
        assert struct.pack("d", reduce_numbers(held, reduction)) == struct.pack("d", value)


@given(st.lists(st.tuples(FINITE, WEIGHTS), min_size=1, max_size=4), st.floats(), st.sampled_from(AVERAGES[:3]))
def test_rank_of_weight_zero_is_ignored_whatever_it_holds(pairs, ignored, reduction):
    values, weights = zip(*pairs, strict=True)
    without = reduce_numbers(numbers(values, weights), reduction)
    for position in range(len(pairs) + 1):
        held = numbers(values, weights)
        held.insert(position, Number(ignored, 0.0))
        assert reduce_numbers(held, reduction) == without


@given(st.lists(FINITE, min_size=1, max_size=3), st.sampled_from(["mean", "sum", "min", "max"]))
def test_nan_on_a_rank_that_counts_gives_nan(values, reduction):
    for position in range(len(values) + 1):
        assert math.isnan(reduce_numbers(numbers([*values[:position], math.nan, *values[position:]]), reduction))


def test_infinities_and_overflow_do_not_raise():
    assert reduce_numbers(numbers([math.inf, 1.0]), "mean") == math.inf
    assert math.isnan(reduce_numbers(numbers([math.inf, -math.inf]), "mean"))
    assert reduce_numbers(numbers([1.7e308, 1.7e308]), "sum") == math.inf
    assert reduce_numbers(numbers([-1.7e308, -1.6e308]), "sum") == -math.inf
    assert reduce_numbers(numbers([1.5e308, 1.7e308]), "mean") == pytest.approx(1.6e308)


@pytest.mark.parametrize(
    ("values", "weights", "mean", "total"),
    [
        ([1.0, 3.0], [1e308, 1e308], 2.0, math.inf),
        ([1.0, 3.0], [1.7e308, 1.7e308], 2.0, math.inf),
        ([1.0, 3.0], [5e-324, 5e-324], 2.0, 2e-323),
        ([1e308, -1e308], [1e308, 1e308], 0.0, 0.0),
        ([1.7e308, 1.6e308], [3.0, 1.0], 1.675e308, math.inf),
        ([1e-310, 3e-310], [0.5, 0.5], 2e-310, 2e-310),
        ([math.inf, 1.0], [1e-308, 1e308], math.inf, math.inf),
    ],
)
def test_weights_and_values_at_the_ends_of_the_range_are_right(values, weights, mean, total):
    assert reduce_numbers(numbers(values, weights), "mean") == pytest.approx(mean, rel=1e-15)
    assert reduce_numbers(numbers(values, weights), "sum") == pytest.approx(total, rel=1e-15)


@given(st.lists(st.tuples(st.floats(-1e300, 1e300), WEIGHTS), min_size=2, max_size=5))
def test_mean_lies_between_its_values(pairs):
    values, weights = zip(*pairs, strict=True)
    slack = 1e-13 * max(map(abs, values))
    assert min(values) - slack <= reduce_numbers(numbers(values, weights), "mean") <= max(values) + slack


def test_identical_prints_every_rank_where_values_differ():
    assert reduce_numbers(numbers([0.1, 0.1]), "identical") == 0.1
    assert math.isnan(reduce_numbers(numbers([math.nan, math.nan]), "identical"))
    with pytest.raises(MetricMismatchError) as caught:
        reduce_numbers(numbers([0.1, 0.30000000000000004, 0.1]), "identical")
    assert "rank 0: 0.1\n  rank 1: 0.30000000000000004\n  rank 2: 0.1" in str(caught.value)


@pytest.mark.parametrize("reduction", ["mean", "sum", "min", "max"])
def test_weights_that_say_nothing_are_refused(reduction):
    with pytest.raises(InvalidMetricError, match="0 on every rank"):
        reduce_numbers(numbers([1.0, 2.0], [0.0, 0.0]), reduction)
    with pytest.raises(InvalidMetricError, match=r"not on ranks \[1\]"):
        reduce_numbers(numbers([1.0, 2.0], [1.0, None]), reduction)


class Float(float):
    pass


@pytest.mark.parametrize(
    "value",
    [0.5, Float(0.5), Fraction(1, 2), Decimal("0.5"), np.float32(0.5), np.array(0.5), torch.tensor(0.5),
     np.array([0.5]), np.array([[0.5]], dtype=np.float16), np.longdouble(0.5),
     torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.bfloat16, requires_grad=True)],
    ids=lambda value: f"{type(value).__name__} {value!r}",
)  # fmt: skip
def test_numbers_of_any_kind_are_read(value):
    reading = read_value(value, value)
    assert (reading.value, type(reading.value), reading.weight) == (0.5, float, 0.5)


def test_integers_zero_and_non_finite_values_are_read():
    assert read_value(0).value == 0.0
    assert read_value(torch.tensor(3), torch.tensor(0)).weight == 0.0
    assert math.isnan(read_value(torch.tensor(math.nan)).value)
    assert read_value(math.inf).value == math.inf


@pytest.mark.parametrize(
    "value",
    ["0.5", b"0.5", True, 1j, [0.5], range(3), np.array([0.5, 1.0]), np.bool_(True), np.array(True), np.array([]),
     np.complex64(1 + 2j), np.str_("0.5"), np.timedelta64(1, "ns"), np.array(None), torch.empty((), device="meta"),
     torch.tensor([0.5, 1.0]), torch.tensor([]), torch.tensor(1j), 10**400, torch.tensor(True),
     np.ma.masked, np.ma.array([0.5], mask=[True])],
    ids=lambda value: f"{type(value).__name__} {value!r}",
)  # fmt: skip
def test_what_is_no_number_is_refused(value):
    with pytest.raises(InvalidMetricError, match="the metric must be"):
        read_value(value)


def test_mapping_is_read_by_the_metric_key_or_its_last_part():
    values = {"loss": 0.5, "val/accuracy": torch.tensor(0.25)}
    assert read_value(values, metric_key="val/loss").value == 0.5
    assert read_value(values, metric_key="val/accuracy").value == 0.25
    missing = read_value(values, metric_key="val/f1")
    assert (missing.value, missing.absent) == (
        None,
        "observe() received a mapping without 'val/f1'; it has: loss, val/accuracy",
    )
    with pytest.raises(InvalidMetricError, match="the metric must be"):
        read_value({"loss": [0.5]}, metric_key="loss")


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, "1"])
def test_weight_must_be_a_finite_number_that_is_not_negative(weight):
    with pytest.raises(InvalidMetricError, match="weight of the metric"):
        read_value(1.0, weight)


def test_scalar_is_read_from_the_log_of_this_iteration_only():
    now, before = TrainingIteration(update=2), TrainingIteration(update=1)
    cache = {"new": LoggedScalar(0.5, 3.0, now), "old": LoggedScalar(0.5, None, before)}
    assert (read_scalar(cache, "new", now).value, read_scalar(cache, "new", now).weight) == (0.5, 3.0)
    assert read_scalar(cache, "old", now).absent.startswith("metric key 'old' was last logged at U1, not at U2")
    assert "logged keys: new, old" in read_scalar(cache, "other", now).absent
    assert "log cache is empty" in read_scalar({}, "other", now).absent


def agree(per_rank, reduction):
    """What this rank gets, to the bit: a value, or an error."""
    ranks = Ranks.connect()
    value, weight = per_rank[ranks.rank]
    try:
        return agree_on_metric(ranks, "loss", lambda: read_value(value, weight), reduction).value.hex()
    except (MissingMetricError, InvalidMetricError, MetricMismatchError) as error:
        return type(error), str(error)


def agree_on_each(cases):
    return [agree(*case) for case in cases]


AWKWARD = [0.1, 1e16, -1e16, 3.3]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_has_the_same_bits(world_size):
    weights = [7, 1e-3, 64.0, 0.0]
    some = list(zip(AWKWARD[:world_size], weights, strict=False))
    cases = [
        (some, "mean"),
        (some, "sum"),
        ([(v, None) for v in AWKWARD], "mean"),
        ([(0.1, w) for w in weights], "mean"),
    ]
    cases += [([(v, None) for v in AWKWARD], reduction) for reduction in ("sum", "min", "max", "rank0")]
    outcomes = run_ranks(agree_on_each, world_size, cases)
    assert outcomes == [outcomes[0]] * world_size
    used = AWKWARD[:world_size]
    weighted = [Fraction(value) * Fraction(weight) for value, weight in some]
    found = list(map(float.fromhex, outcomes[0]))
    assert found[0] == pytest.approx(float(sum(weighted) / sum(Fraction(weight) for _, weight in some)), rel=1e-15)
    assert found[1] == pytest.approx(float(sum(weighted)), rel=1e-15)
    assert found[3] == 0.1
    assert found[4:] == [math.fsum(used), min(used), max(used), 0.1]


def test_a_bad_value_on_one_rank_is_the_same_error_on_every_rank():
    good = (1.0, None)
    cases = [
        ([good, ("high", None), good], "mean"),
        ([good, (None, None), good], "mean"),
        ([(None, None)] * 3, "max"),
        ([good, (2.0, None), good], "identical"),
        ([(1.0, 2.0), good, (1.0, 2.0)], "mean"),
        ([(None, None), good, good], "rank0"),
    ]
    outcomes = run_ranks(agree_on_each, 3, cases)
    assert outcomes == [outcomes[0]] * 3
    text, one, all_of_them, differing, weights, main = outcomes[0]
    assert text[0] is InvalidMetricError
    assert "rank 1 of 3" in text[1]
    assert "'high'" in text[1]
    assert one[0] is all_of_them[0] is main[0] is MissingMetricError
    assert "missing on 1 of 3 ranks:\n  rank 1: observe() received None\n" in one[1]
    assert "missing on 3 of 3 ranks:\n  rank 0" in all_of_them[1]
    assert not any(word in one[1] for word in ("callback", "trainer", "logged")), "these words are of another face"
    assert "  rank 1: 2.0\n" in differing[1]
    assert "not on ranks [1]" in weights[1]
    assert "missing on 1 of 3 ranks:\n  rank 0" in main[1]


def test_only_ranks_that_count_need_a_value():
    nothing = (None, None)
    cases = [
        ([(1.5, None), nothing, nothing], "rank0"),
        ([(1.5, 2), (None, 0), (4.5, 1)], "mean"),
        ([(1.5, 2), (math.nan, 0), (4.5, 1)], "mean"),
    ]
    assert run_ranks(agree_on_each, 3, cases) == [[(1.5).hex(), (2.5).hex(), (2.5).hex()]] * 3


def read_from_logs(caches):
    ranks = Ranks.connect()
    with pytest.raises(KeyError) as caught:
        agree_on_metric(
            ranks,
            "loss/val",
            lambda: read_scalar(caches[ranks.rank], "loss/val", TrainingIteration(update=1)),
            "mean",
            remedy=LOG_REMEDY,
        )
    return str(caught.value)


def test_key_that_one_rank_lacks_is_a_key_error_on_every_rank():
    logged = LoggedScalar(1.0, None, TrainingIteration(update=1))
    outcomes = run_ranks(read_from_logs, 2, [{"loss/val": logged}, {"loss/train": logged, "accuracy": logged}])
    assert outcomes == [outcomes[0]] * 2
    assert "the monitored metric 'loss/val' is missing on 1 of 2 ranks:\n  rank 1:" in outcomes[0]
    assert "logged keys: accuracy, loss/train" in outcomes[0]
    assert "a callback of the trainer that logs it needs the same every_n_*" in outcomes[0]


def test_missing_key_names_the_one_that_is_near():
    read = [
        read_scalar(
            {"loss/val": LoggedScalar(1.0, None, TrainingIteration(update=1))}, "loss/vall", TrainingIteration(update=1)
        ).absent,
        read_value({"val_loss": 1.0, "accuracy": 0.5}, metric_key="loss/val").absent,
        read_value({"accuracy": 0.5}, metric_key="loss/val").absent,
    ]
    assert [text.partition("; did you mean ")[2] for text in read] == ["'loss/val'?", "'val_loss'?", ""]


@pytest.mark.parametrize(
    ("key", "higher"),
    [("loss/val/total", False), ("Loss/Val", False), ("accuracy1/test", True), ("f1", True), ("val/error_rate", False),
     ("val/perplexity", False)],
)  # fmt: skip
def test_direction_is_known_from_the_name(key, higher):
    assert MetricPropertyProvider().higher_is_better(key) == higher


@pytest.mark.parametrize("key", ["speed", "", "accuracy_loss", "val/x"])
def test_direction_is_never_guessed(key):
    with pytest.raises(ConfigError, match="set higher_is_better to true or false"):
        MetricPropertyProvider().higher_is_better(key)


LOWER = """
    val_loss train.loss trainLoss valLoss VAL_LOSS MSELoss L1Loss loss/val/heatmap loss/val/decoder2 perplexity ppl wer
    cer mae rmse ece lpips fid kid val/top1_error top-5_err false_positive_rate bits_per_byte cross_entropy kl_div
    val/brier crps nll val/inaccuracy word_error_rate
"""
HIGHER = """
    top_1-acc val/acc@1-test
    top1 top-5 acc@1 Acc1 mAP50 mAP@50 metrics/mAP50-95(B) val/map_small bbox_mAP_50 AP50 mcc mrr ndcg nDCG@10 bleu
    BLEU-4 rouge rouge1 RougeL r2 R2 auc auroc ROC-AUC val_roc_auc iou mIoU IoU psnr ssim ms_ssim SI-SDR f1 F1Score
    f1_macro recall@5 hits@10 pass@1 former_mcc eval_sts-dev_spearman_cosine cancer_sensitivity lower_jaw_dsc
"""
UNKNOWN = """
    heatmap heat_map heatMap decoder2 layer2 encoder_2 confidence fidelity former transformer_score power answer_rate
    certainty viewer returned_items depth_map loss_scale mixed_precision apple ümap top
"""
CONTRADICTORY = """
    neg_log_likelihood neg_mse loss/val/dice loss/val/f1 loss/val/accuracy accuracy/val/loss accuracy_loss 1-ssim
    val_1-ssim test.1-f1
    precision_loss recall_error one_minus_dice accuracy_gap accuracy_std time_to_accuracy negative_f1
"""


@pytest.mark.parametrize(("keys", "higher"), [(LOWER, False), (HIGHER, True)])
def test_common_names_are_known_however_they_are_written(keys, higher):
    provider = MetricPropertyProvider()
    assert {key: provider.higher_is_better(key) for key in keys.split()} == dict.fromkeys(keys.split(), higher)


@pytest.mark.parametrize("key", UNKNOWN.split())
def test_part_of_a_word_shows_no_direction(key):
    with pytest.raises(ConfigError, match=r"it is not known .*set higher_is_better to true or false"):
        MetricPropertyProvider().higher_is_better(key)


@pytest.mark.parametrize("key", CONTRADICTORY.split())
def test_words_that_contradict_each_other_are_refused(key):
    with pytest.raises(ConfigError, match=r"contradicts itself.*set higher_is_better to true or false"):
        MetricPropertyProvider().higher_is_better(key)


def test_pattern_wins_over_the_words():
    provider = MetricPropertyProvider(higher_is_better=["neg_*"], lower_is_better=["loss/val/dice"])
    assert provider.higher_is_better("val/neg_mse")
    assert not provider.higher_is_better("loss/val/dice")
    with pytest.raises(ConfigError, match="contradicts itself"):
        MetricPropertyProvider(higher_is_better=["*a*"], lower_is_better=["*b*"]).higher_is_better("ab")


def pass_a_partial_sum():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = init_device_mesh("cpu", (2,))
    whole = read_value(DTensor.from_local(torch.tensor(1.5), mesh, [Replicate()])).value
    refused = []
    for placement in (Partial(), Shard(0)):
        value = DTensor.from_local(torch.tensor([1.0 + dist.get_rank()]), mesh, [placement])
        with pytest.raises(InvalidMetricError, match="full_tensor") as caught:
            read_value(value)
        refused.append(str(caught.value))
    return whole, len(refused)


def test_tensor_of_which_each_rank_holds_a_part_is_refused():
    assert run_ranks(pass_a_partial_sum, 2) == [(1.5, 2)] * 2


def test_own_patterns_add_to_the_known_ones():
    provider = MetricPropertyProvider(higher_is_better=["*Speed*"], lower_is_better=["*time"])
    assert provider.higher_is_better("val/top_speed")
    assert not provider.higher_is_better("val/step_time")
    assert not provider.higher_is_better("loss")
