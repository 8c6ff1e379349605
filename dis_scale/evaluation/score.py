"""The Inception Score, exp(E KL(p(y|x) || p(y))) averaged over splits (Salimans et al. 2016), in one pass."""

import numpy as np

SHUFFLE_SEED, SHUFFLED_SPLITS = 2020, 10
"""As in torch-fidelity."""
ADM_SPLIT_IMAGES = 5000


def shuffled_splits(samples: int) -> np.ndarray:
    """Return each sample's split, int (N): ten even splits of the shuffled samples, as in torch-fidelity."""
    positions = np.arange(samples)
    borders = np.arange(SHUFFLED_SPLITS + 1) * samples // SHUFFLED_SPLITS
    splits = np.empty(samples, int)
    splits[np.random.RandomState(SHUFFLE_SEED).permutation(samples)] = np.searchsorted(borders, positions, "right") - 1
    return splits


def adm_splits(samples: int) -> np.ndarray:
    """Return each sample's split as in ADM's evaluator: 5,000 samples each, in order."""
    return np.arange(samples) // ADM_SPLIT_IMAGES


class Score:
    """Per split: count, sum of p and sum of p log p, in float64."""

    def __init__(self, splits_N: np.ndarray, classes: int) -> None:
        self._splits, self._seen = splits_N, 0
        self._count = np.bincount(splits_N)
        self._p, self._plogp = np.zeros((len(self._count), classes)), np.zeros(len(self._count))

    def add(self, logits_NC: np.ndarray) -> None:
        """Add the next samples' logits."""
        splits = self._splits[self._seen : self._seen + len(logits_NC)]
        self._seen += len(logits_NC)
        shifted = logits_NC.astype(np.float64) - logits_NC.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        p = np.exp(log_p)
        np.add.at(self._p, splits, p)
        np.add.at(self._plogp, splits, (p * log_p).sum(1))

    def result(self) -> tuple[float, float | None]:
        """Return the mean over the splits and its standard error (None for one split)."""
        q = self._p / self._count[:, None]
        q_log_q = q * np.log(q, out=np.zeros_like(q), where=q > 0)
        scores = np.exp(self._plogp / self._count - q_log_q.sum(1))
        error = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None
        return float(scores.mean()), error
