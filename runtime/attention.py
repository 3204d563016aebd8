"""The attention operator: one node in every exported graph, its kernel chosen where it runs.

Importing this file needs PyTorch and registers `torch.ops.wanexport.attention`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("wanexport::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v as [B, S, H, D]; there is no mask.

    q is [B, S, H, D], k and v are [B, T, H, D], and all three have one dtype.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)
