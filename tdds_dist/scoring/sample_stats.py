"""The nine scalars that are kept of a sample's outputs in one epoch, each computed from logits row
by row.

These scalars are all that any score of the package needs; the trajectory stores them. Every
reduction here runs along the class axis of one row, so a row's result does not depend on which
other rows share the batch (that makes scores bitwise independent of the world size).
"""

# B rows, C classes, F number of scalars

import torch
from torch import Tensor

OFFICIAL_EPSILON = 1e-8  # added inside the logarithms of the authors' code
# exp of it is 0 in float64, so probabilities do not change; keeps 0 * log(0) and float16 finite
LOGP_FLOOR = -1.0e4

SCALARS = (
    # sum_c |p' (log(p' + 1e-8) - log(p + 1e-8))|, p previous epoch, p' this one (authors' code)
    "delta_official",
    "delta_paper",  # sum_c p' log(p' / p), Eq. 10
    "delta_ce",  # log(p'_y / p_y), section 5.4
    "p_label",  # p'_y
    "logit_margin",  # logit_y - largest other logit (AUM)
    "p_margin",  # p'_y - largest other p'
    "entropy",  # -sum_c p' log p'
    "el2n",  # || p' - onehot(y) ||_2
    "correct",  # 1 where y has the (first) largest logit
)
# 1 where the sample was visited in the epoch; 0: the others are those of its last visit. Recorded
# where epochs may skip samples.
VISITED = "visited"
DELTAS = SCALARS[:3]  # need the previous epoch; NaN in the first


def log_probabilities(logits_BC: Tensor) -> Tensor:
    """Compute the float32 log-softmax [B, C], floored at LOGP_FLOOR."""
    # step by step: of few classes, torch.log_softmax takes several times as long
    logits_BC = logits_BC.float()
    logp_BC = logits_BC - logits_BC.amax(dim=1, keepdim=True)
    return logp_BC.sub_(logp_BC.exp().sum(dim=1, keepdim=True).log_()).clamp_min_(LOGP_FLOOR)


def _official(previous_p_BC: Tensor, p_BC: Tensor, work_BC: Tensor) -> Tensor:
    """Compute the official loss difference, overwriting `previous_p_BC` and `work_BC`; one log of
    the ratio replaces two logs.
    """
    torch.add(p_BC, OFFICIAL_EPSILON, out=work_BC).div_(previous_p_BC.add_(OFFICIAL_EPSILON))
    return work_BC.log_().mul_(p_BC).abs_().sum(dim=1)


def loss_difference_paper(previous_logp_BC: Tensor, logp_BC: Tensor) -> Tensor:
    """Compute the loss difference of Eq. 10, the KL divergence of this epoch's probabilities from
    the previous ones; float32 [B]."""
    return (logp_BC - previous_logp_BC).mul_(logp_BC.exp()).sum(dim=1)


def sample_scalars(
    logits_BC: Tensor, logp_BC: Tensor, previous_logp_BC: Tensor | None, label_B: Tensor
) -> Tensor:
    """Compute all SCALARS of a batch, float32 [F, B], as `scalars_overwriting` does, and leave the
    arguments alone.

    `logits_BC` may have any floating dtype and is computed in float32.
    """
    logits_BC = logits_BC.to(torch.float32, copy=True)
    previous_logp_BC = None if previous_logp_BC is None else previous_logp_BC.clone()
    return scalars_overwriting(logits_BC, logp_BC, previous_logp_BC, label_B).T


def scalars_overwriting(
    logits_BC: Tensor, logp_BC: Tensor, previous_logp_BC: Tensor | None, label_B: Tensor
) -> Tensor:
    """Compute all SCALARS of a batch, float32 [B, F]; to save memory, `logits_BC` and
    `previous_logp_BC` are overwritten.

    `logp_BC` are the log-probabilities of `logits_BC`, `previous_logp_BC` those of the previous
    epoch (any source precision; None in the first epoch, where the DELTAS are NaN); all float32.
    `label_B` int64 must lie in [0, C).
    """
    label_B1 = label_B[:, None]
    p_BC = logp_BC.exp()
    p_label_B1, logit_B1 = p_BC.gather(1, label_B1), logits_BC.gather(1, label_B1)

    other_logit_B1, other_B1 = logits_BC.scatter_(1, label_B1, -torch.inf).max(dim=1, keepdim=True)
    # the first of the largest: one before the label must be smaller, one after it may be as large
    is_correct_B1 = (logit_B1 > other_logit_B1) | (
        (logit_B1 == other_logit_B1) & (label_B1 < other_B1)
    )
    columns = [p_label_B1, logit_B1 - other_logit_B1, p_label_B1 - p_BC.gather(1, other_B1)]

    if previous_logp_BC is None:
        work_BC = logits_BC
        deltas = [torch.full_like(p_label_B1, torch.nan)] * len(DELTAS)
    else:
        work_BC = torch.sub(logp_BC, previous_logp_BC, out=logits_BC)
        ce_B1 = work_BC.gather(1, label_B1)
        paper_B = work_BC.mul_(p_BC).sum(dim=1)
        deltas = [
            _official(previous_logp_BC.exp_(), p_BC, work_BC)[:, None],
            paper_B[:, None],
            ce_B1,
        ]
    entropy_B = torch.mul(p_BC, logp_BC, out=work_BC).sum(dim=1).neg_()
    el2n_B = torch.linalg.vector_norm(p_BC.scatter_(1, label_B1, p_label_B1 - 1.0), dim=1)
    return torch.cat([*deltas, *columns, entropy_B[:, None], el2n_B[:, None], is_correct_B1], dim=1)
