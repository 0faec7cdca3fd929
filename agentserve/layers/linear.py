"""Linear layers whose parameters stay in one storage for the life of the process.

Several checkpoint matrices may share one fused weight (q, k and v; gate and up): `parts` names the slices, and
loading or publishing is a copy into them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """`x [T, in] → [T, out]`, with `parts` = {name in the checkpoint: its output rows}."""

    def __init__(
        self,
        in_features: int,
        parts: dict[str, int],
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        super().__init__()
        self.parts = parts
        out_features = sum(parts.values())
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def views(self) -> dict[str, torch.Tensor]:
        """Each checkpoint tensor of this layer (`name.weight`, `name.bias`) as a view into the fused storage."""
        named, start = {}, 0
        for name, rows in self.parts.items():
            named[f"{name}.weight"] = self.weight.data[start : start + rows]
            if self.bias is not None:
                named[f"{name}.bias"] = self.bias.data[start : start + rows]
            start += rows
        return named
