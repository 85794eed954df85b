"""NV-Embed's latent-attention pooler (arXiv 2405.17428, section 3.2), folded as far as weights allow.

For token states x `[n, d]` and latents L `[512, d]`, with LN a layer norm and h running over the 8 heads:

    a = x + sum_h softmax(LN(x) Wq_h (LN'(L) Wk_h)^T / sqrt(s)) (LN'(L) Wv_h) Wo_h      s: size of a head
    y = a + W2 (u * gelu(g)) + b2,  [u, g] = W1 LN''(a) + b1                             (GEGLU, exact GELU)

and the vector is the mean of y over the pooled positions. Latents are constants once loaded, so Wq_h K_h^T
and V_h Wo_h fold into one matrix each, `[d, 8 * 512]` and `[8 * 512, d]`: for MM-Embed 8 times fewer
multiplications per token than projecting queries, and 34 M instead of 537 M weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from umr_plugins.errors import CheckpointError

HEADS = 8
_BLOCKS = "cross_attend_blocks"


def tensor_names() -> list[str]:
    """What a checkpoint must hold below `latent_attention_model.`, and nothing else."""
    attend = [f"{_BLOCKS}.0.fn.{name}.weight" for name in ("to_q", "to_kv", "to_out")]
    norms = [f"{_BLOCKS}.{name}.{part}" for name in _NORMS for part in ("weight", "bias")]
    feed = [f"{_BLOCKS}.1.fn.net.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")]
    return ["latents", *attend, *norms, *feed]


_NORMS = ("0.norm", "0.norm_context", "1.norm")


class LatentAttention(nn.Module):
    """The pooler, ready to run.

    Args:
        tensors: by name, as `tensor_names` lists them.
        dtype: to run in. Folding is done in float32.

    Raises:
        CheckpointError: shapes that don't belong together; the message names the tensor.
    """

    @torch.no_grad()  # what is computed here once must not keep the graph it came from
    def __init__(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        latents = tensors["latents"].float()
        count, width = latents.shape
        inner = _shaped(tensors, f"{_BLOCKS}.0.fn.to_q.weight", None, width).shape[0]
        if inner % HEADS:
            raise CheckpointError(f"{_BLOCKS}.0.fn.to_q.weight: {inner} rows don't make {HEADS} heads")
        head = inner // HEADS
        _shaped(tensors, f"{_BLOCKS}.0.fn.to_kv.weight", 2 * inner, width)
        _shaped(tensors, f"{_BLOCKS}.0.fn.to_out.weight", width, inner)
        context = _norm(tensors, "0.norm_context", width)(latents)
        scores, values = [], []
        for number in range(HEADS):  # one head at a time: the projections are the largest tensors
            rows = slice(number * head, (number + 1) * head)
            query = tensors[f"{_BLOCKS}.0.fn.to_q.weight"][rows].float()
            key, value = (
                context @ tensors[f"{_BLOCKS}.0.fn.to_kv.weight"][offset:][rows].float().T
                for offset in (0, inner)
            )
            scores.append(query.T @ key.T / math.sqrt(head))  # [d, latents]
            values.append(value @ tensors[f"{_BLOCKS}.0.fn.to_out.weight"][:, rows].float().T)
        self.register_buffer("scores", torch.cat(scores, 1).to(dtype), persistent=False)
        self.register_buffer("values", torch.cat(values, 0).to(dtype), persistent=False)
        self.norm = _norm(tensors, "0.norm", width).to(dtype)
        self.feed_norm = _norm(tensors, "1.norm", width).to(dtype)
        self.up = _linear(tensors, f"{_BLOCKS}.1.fn.net.0", None, width).to(dtype)
        if self.up.out_features % 2:
            raise CheckpointError(f"{_BLOCKS}.1.fn.net.0.weight: GEGLU needs an even number of rows")
        self.down = _linear(tensors, f"{_BLOCKS}.1.fn.net.2", width, self.up.out_features // 2).to(dtype)
        self.latents = count

    scores: torch.Tensor
    values: torch.Tensor

    def forward(self, states: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """Token states `[batch, length, d]`, pooled positions `[batch, length]` to `[batch, d]`, float32."""
        batch, length, _ = states.shape
        weights = (self.norm(states) @ self.scores).view(batch, length, HEADS, self.latents)
        shares = weights.float().softmax(-1).to(states.dtype).flatten(2)
        attended = states + shares @ self.values
        up, gate = self.up(self.feed_norm(attended)).chunk(2, dim=-1)
        out: torch.Tensor = (attended + self.down(up * F.gelu(gate))).float()
        share = pooled.to(out.dtype)[..., None]
        return (out * share).sum(1) / share.sum(1)


def _shaped(
    tensors: Mapping[str, torch.Tensor], name: str, rows: int | None, columns: int | None
) -> torch.Tensor:
    tensor = tensors[name]
    wanted = (rows, columns) if columns is not None else (rows,)
    if tensor.ndim != len(wanted) or any(
        want not in (None, have) for want, have in zip(wanted, tensor.shape, strict=True)
    ):
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, expected {wanted}")
    return tensor


def _norm(tensors: Mapping[str, torch.Tensor], name: str, width: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(width)
    with torch.no_grad():
        for part in ("weight", "bias"):
            getattr(norm, part).copy_(_shaped(tensors, f"{_BLOCKS}.{name}.{part}", width, None))
    return norm


def _linear(tensors: Mapping[str, torch.Tensor], name: str, rows: int | None, columns: int) -> nn.Linear:
    weight = _shaped(tensors, f"{name}.weight", rows, columns)
    with torch.device("meta"):
        linear = nn.Linear(columns, len(weight))
    linear.weight = nn.Parameter(weight)
    linear.bias = nn.Parameter(_shaped(tensors, f"{name}.bias", len(weight), None))
    return linear
