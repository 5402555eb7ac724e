"""The language-model loss, computed where a label is and nowhere else."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def label_loss(lm_head: nn.Module, x_TD: Tensor, predict_row: Tensor, label_L: Tensor) -> Tensor:
    """Sum over the labels (L,) of the cross entropy, in float32, of the tokens before them (rows ``predict_row`` of
    ``x_TD``). Divide by the number of label tokens of the whole optimizer step: a mean here would weigh a token by the
    length of the micro-batch it happens to be in. No labels give 0 with a gradient of 0."""
    logits_LV = lm_head(x_TD.index_select(0, predict_row))
    return F.cross_entropy(logits_LV.float(), label_L, reduction="sum")
