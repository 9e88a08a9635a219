"""Attention whose projections stand outside of it, so that content and position can be told apart."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ProjectedAttention(nn.Module):
    """Multi-head attention of queries, keys and values that are already projected.

    The width of queries and keys may differ from that of the values: Conditional DETR's cross-attention has
    content and position beside each other in the former (arXiv 2108.06152, figure 3).

    Args:
        dim: channels of the values and of the result, a multiple of `num_heads`.
        num_heads: attention heads.
        dropout: probability in the attention weights.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        padding: Tensor | None = None,
        blocked: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, E), heads beside each other.
            key: (B, S, E).
            value: (B, S, D).
            padding: (B, S) bool, True = this key is padding.
            blocked: (Q, S) bool, True = this query does not see this key, in any image.

        Returns:
            (B, Q, D).
        """
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        seen = None if padding is None else ~padding[:, None, None]  # B x 1 x 1 x S
        if blocked is not None:
            seen = ~blocked if seen is None else seen & ~blocked
        x = F.scaled_dot_product_attention(q, k, v, seen, self.dropout if self.training else 0.0)  # B x M x Q x D/M
        return self.out_proj(x.transpose(1, 2).flatten(-2))
