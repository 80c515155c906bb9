"""What is kept of one sample's outputs in one epoch: nine numbers per sample, each computed from logits row by row.

These scalars are all that any score of the package needs; the trajectory stores them. Every reduction here runs along
the class axis of one row, so a row's result does not depend on which other rows share the batch (that makes scores
bitwise independent of the world size).
"""

# B rows, C classes, F number of scalars

import torch
from torch import Tensor

OFFICIAL_EPSILON = 1e-8  # added inside the logarithms of the authors' code
LOGP_FLOOR = -1.0e4  # exp of it is 0 in float64, so probabilities do not change; keeps 0 * log(0) and float16 finite

SCALARS = (
    "delta_official",  # sum_c |p' (log(p' + 1e-8) - log(p + 1e-8))|, p previous epoch, p' this one (authors' code)
    "delta_paper",  # sum_c p' log(p' / p), Eq. 10
    "delta_ce",  # log(p'_y / p_y), section 5.4
    "p_label",  # p'_y
    "logit_margin",  # logit_y - largest other logit (AUM)
    "p_margin",  # p'_y - largest other p'
    "entropy",  # -sum_c p' log p'
    "el2n",  # || p' - onehot(y) ||_2
    "correct",  # 1 where y has the (first) largest logit
)
DELTAS = SCALARS[:3]  # need the previous epoch; NaN in the first


def log_probabilities(logits_BC: Tensor) -> Tensor:
    """float32 log-softmax [B, C], floored at LOGP_FLOOR."""
    return torch.log_softmax(logits_BC.float(), dim=1).clamp_min_(LOGP_FLOOR)


def loss_difference_official(previous_logp_BC: Tensor, logp_BC: Tensor) -> Tensor:
    """Loss difference as the authors' code computes it: absolute value per class, epsilon in both logs; float32 [B]."""
    p_BC, previous_p_BC = logp_BC.exp(), previous_logp_BC.exp()
    log_ratio_BC = (p_BC + OFFICIAL_EPSILON).log_() - (previous_p_BC + OFFICIAL_EPSILON).log_()
    return (p_BC * log_ratio_BC).abs_().sum(dim=1)


def loss_difference_paper(previous_logp_BC: Tensor, logp_BC: Tensor) -> Tensor:
    """Loss difference of Eq. 10, the KL divergence of this epoch's probabilities from the previous ones; float32 [B]."""
    return (logp_BC.exp() * (logp_BC - previous_logp_BC)).sum(dim=1)


def sample_scalars(logits_BC: Tensor, logp_BC: Tensor, previous_logp_BC: Tensor | None, label_B: Tensor) -> Tensor:
    """All SCALARS of a batch, float32 [F, B].

    `logp_BC` are the log-probabilities of `logits_BC`, `previous_logp_BC` those of the previous epoch (float32, any
    source precision; None in the first epoch, where the DELTAS are NaN). `label_B` int64 must lie in [0, C).
    """
    label_B1 = label_B[:, None]
    logits_BC = logits_BC.float()
    p_BC = logp_BC.exp()
    p_label_B = p_BC.gather(1, label_B1)[:, 0]

    if previous_logp_BC is None:
        deltas = [torch.full_like(p_label_B, torch.nan)] * len(DELTAS)
    else:
        deltas = [
            loss_difference_official(previous_logp_BC, logp_BC),
            loss_difference_paper(previous_logp_BC, logp_BC),
            (logp_BC - previous_logp_BC).gather(1, label_B1)[:, 0],
        ]

    others_BC = logits_BC.scatter(1, label_B1, -torch.inf)
    other_logit_B, other_B = others_BC.max(dim=1)
    error_BC = p_BC.scatter_add(1, label_B1, p_BC.new_full(label_B1.shape, -1.0))
    return torch.stack([
        *deltas,
        p_label_B,
        logits_BC.gather(1, label_B1)[:, 0] - other_logit_B,
        p_label_B - p_BC.gather(1, other_B[:, None])[:, 0],
        -(p_BC * logp_BC).sum(dim=1),
        error_BC.square_().sum(dim=1).sqrt_(),
        (logits_BC.argmax(dim=1) == label_B).float(),
    ])
