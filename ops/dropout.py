"""Dropout whose random numbers take a quarter of the time on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """nn.Dropout; on the CPU each element takes 16 random bits, of which torch draws 64.

    So the rate is rounded to a multiple of 1 / 65,536. A step takes .92 of the time
    (docs/log.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(...,) -> (...,)."""
        dropped = round(self.p * 2**16)
        if not self.training or not 0 < dropped < 2**16 or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = bits.view(torch.int16)[: x.numel()].view_as(x)  # uniform in -2^15..2^15 - 1
        mask = (bits >= dropped - 2**15).to(x.dtype).mul_(2**16 / (2**16 - dropped))
        return x * mask
