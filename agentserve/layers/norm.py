"""Root-mean-square normalization (Zhang and Sennrich, 2019), the only norm these families use."""

from __future__ import annotations

import torch
from torch import nn

from agentserve.kernels import rms_norm


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension; computed in float32, returned in x's dtype."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm.rms_norm(x, self.weight, self.eps)
