"""The direction in which a metric is better, derived from the words of its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from keepbest.errors import ConfigError


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Each entry is one word, or several that follow each other, written together: "falsepositive" is false_positive,
# falsePositive and false-positive. What is only a part of another word does not count.
LOWER_IS_BETTER = _set(
    """
    loss losses logloss cost error errors err mistakes inaccuracy misclassification misclassified deviance regret
    distance distances divergence kl kld kldiv jsd perplexity ppl bpb bpc bpd bitsperbyte bitsperchar bitspercharacter
    bitspertoken bitsperdim nll nlpd bce xent crossentropy
    mse rmse mae medae mape smape wape mase msle rmsle nrmse rmspe huber silog absrel sqrel epe ade fde minade minfde
    wer cer ter eer ber levenshtein
    fpr fnr fdr frr falsepositive falsepositives falsenegative falsenegatives falsediscovery falsealarm falsealarms
    fid kid fvd fad lpips mcd hausdorff hd95 chamfer assd
    ece mce brier crps daviesbouldin
    """
)
HIGHER_IS_BETTER = _set(
    """
    accuracy accuracies acc auc auroc aucroc rocauc roc auprc aupr aucpr prauc ap map
    f1 f2 fbeta fscore fmeasure hmean precision recall sensitivity specificity tpr tnr ppv npv
    truepositive truepositives truenegative truenegatives negativepredictivevalue positivepredictivevalue
    iou miou giou jaccard dice dsc pck pckh oks pq mota idf1 hota nds
    bleu sacrebleu rouge rougel rougelsum meteor chrf bertscore cider exactmatch
    psnr ssim msssim vmaf snr sdr sisdr sisnr signaltonoise pesq stoi estoi
    r2 rsquared explainedvariance correlation corr pearson pearsonr spearman spearmanr kendall kendalltau plcc srcc
    concordance cindex mcc matthews kappa qwk
    mrr reciprocalrank ndcg dcg cumulativegain hits hitrate winrate successrate
    reward rewards return returns likelihood loglikelihood nmi ari ami silhouette inceptionscore clipscore
    """
)
# Words that turn a direction round, or leave it open, beside one that shows it: "neg_mse", "accuracy_std", "loss_gap".
_UNSETTLING = _set(
    """
    neg negative negated inverse inverted inv minus complement
    std stddev stdev stderr var variance diff difference delta change gap drop gain reduction improvement
    threshold time seconds
    """
)
# What is no metric, though one of its words is the name of one.
_OF_NO_DIRECTION = _set("lossscale lossweight errormap lossmap mixedprecision")
# A map is the mean average precision where the name says so (mAP), at its beginning, and after one of these words.
# After others, as in depth_map, it is a picture.
_BEFORE_MAP = _set(
    """
    val valid validation dev test eval train metric metrics best mean coco voc lvis box bbox boxes mask masks seg segm
    keypoint keypoints kpt pose det detection retrieval
    """
)
_LONGEST = 4  # words that make one entry, such as negative predictive value or bits per byte
_CASE_OR_DIGIT = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[0-9])(?=[^0-9])|(?<=[^0-9])(?=[0-9])")
# Also after another word, but that of top_1-acc. What follows a sign, as in acc@1-val, counts something.
_ONE_MINUS = re.compile(r"(?<!top)(?:^|[_ .(])1 ?-")
_REMEDY = "set higher_is_better to true or false, or add a pattern to MetricPropertyProvider"


class MetricPropertyProvider:
    """Derives from a metric key whether higher is better, by its words.

    Words end at every character that is no letter or digit, where the case changes, and at digits. Only whole words
    count: `heatmap` is no `map`, and `decoder2` no `r2`. Words that contradict each other, such as those of
    `loss/val/dice`, decide nothing.

    Args:
        lower_is_better: Patterns (as in `fnmatch`, without regard to case) for the key, or a part of it between
            slashes. They win over the words.
        higher_is_better: Patterns for metrics of which higher values are better.
    """

    def __init__(self, *, lower_is_better: Sequence[str] = (), higher_is_better: Sequence[str] = ()) -> None:
        self._lower = tuple(lower_is_better)
        self._higher = tuple(higher_is_better)

    def higher_is_better(self, metric_key: str) -> bool:
        """Whether a higher value of `metric_key` is better. **Rank-local**.

        Raises:
            ConfigError: If nothing decides, or what decides contradicts itself. A guess could keep the worst model.
        """
        lower, higher = _matching(self._lower, metric_key), _matching(self._higher, metric_key)
        unsettling: list[str] = []
        if not lower and not higher:
            lower, higher, unsettling = _read(metric_key)
        if not lower and not higher:
            raise ConfigError(f"it is not known whether a higher {metric_key!r} is better; {_REMEDY}")
        if (lower and higher) or unsettling:
            found = [f"{word!r} (lower is better)" for word in lower] + [
                f"{word!r} (higher is better)" for word in higher
            ]
            found += [f"{word!r} (which may turn it round)" for word in unsettling]
            raise ConfigError(
                f"the name {metric_key!r} contradicts itself, or leaves open whether a higher value is better: it has "
                f"{', '.join(found)}; {_REMEDY}"
            )
        return bool(higher)


def _matching(patterns: Sequence[str], metric_key: str) -> list[str]:
    key = metric_key.lower()
    return [
        pattern for pattern in patterns if any(fnmatchcase(part, pattern.lower()) for part in (key, *key.split("/")))
    ]


def _read(metric_key: str) -> tuple[list[str], list[str], list[str]]:
    """The words of a key by which lower is better, those by which higher is, and those that unsettle this."""
    lower: list[str] = []
    higher: list[str] = []
    unsettling: list[str] = []
    top: list[str] = []
    for part in metric_key.split("/"):
        if _ONE_MINUS.search(part.lower()):
            unsettling.append("1-")
        words = words_of(part)
        before = ""
        while words:
            length, entry = _entry(words)
            if words[0] == "map" and before and before not in _BEFORE_MAP:
                entry = ""
            if entry in LOWER_IS_BETTER:
                lower.append(entry)
            elif entry in HIGHER_IS_BETTER:
                higher.append(entry)
            elif entry in _UNSETTLING:
                unsettling.append(entry)
            elif entry in ("top", "pass") and words[1:] and words[1].isdigit():
                top.append(f"{entry}{words[1]}")
            before, words = words[length - 1], words[length:]
    # top5 alone is an accuracy, but there is a top5 error too.
    return lower, higher or ([] if lower else top), unsettling


def words_of(part: str) -> list[str]:
    """Return the words of a metric key, or of a part of it, in small letters."""
    runs = re.findall(r"[^\W_]+", part)
    return [word.lower() for run in runs for word in _CASE_OR_DIGIT.split(run)]


def _entry(words: Sequence[str]) -> tuple[int, str]:
    """The longest entry at the beginning of `words`, and of how many words it is; an unknown word is one."""
    for length in range(min(_LONGEST, len(words)), 0, -1):
        entry = "".join(words[:length])
        if any(entry in known for known in (LOWER_IS_BETTER, HIGHER_IS_BETTER, _UNSETTLING, _OF_NO_DIRECTION)):
            return length, entry
    return 1, words[0]
