"""Idiomatic torch versions of the operations, on the same inputs, for comparison.

Quantised weights and keys become bfloat16 first: torch's matmuls are cuBLAS's in bfloat16.

Axis letters: as in the packages of `pallas_kernels`; N keys per query.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_cases import Case
from pallas_kernels.indexer_topk.keys import Fp4Keys, Fp8Keys, dense
from pallas_kernels.quantize import Fp4Weight, Fp8Weight
from pallas_kernels.quantize import reference as quantize


def form(case: Case) -> Callable[..., Any] | None:
    """The torch version of a case, taking the result of `tensors`; None where there is none."""
    run = _FORMS.get(case.op)
    return run and functools.partial(run, **getattr(case.run, "keywords", {}))


def tensors(inputs: tuple[Any, ...]) -> list[Tensor]:
    """The inputs as tensors, sharing memory; quantised ones as bfloat16."""
    return [torch.from_dlpack(_plain(x)) for x in inputs]


def _plain(x: Any) -> jax.Array:
    if isinstance(x, Fp8Weight | Fp4Weight):
        return jax.jit(lambda w: quantize.dense(w, jnp.bfloat16))(x)
    if isinstance(x, Fp8Keys | Fp4Keys):
        return jax.jit(lambda keys: dense(keys, jnp.int32(0))[None].astype(jnp.bfloat16))(x)
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float8_e4m3fn else x


def array(tensor: Tensor) -> np.ndarray:
    """A result as a NumPy array; bfloat16, which NumPy lacks, as float32."""
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


def select(
    q_BTIJ: Tensor,
    weights_BTI: Tensor,
    keys_LBSJ: Tensor,
    layer: Tensor,
    visible_BT: Tensor,
    *,
    k: int,
) -> Tensor:
    """All scores in memory, then `torch.topk`."""
    B, T, I, J = q_BTIJ.shape
    keys_BJS = keys_LBSJ[layer].transpose(1, 2)
    score_BXS = _dots(q_BTIJ.reshape(B, T * I, J), keys_BJS).relu_()
    score_NIS = score_BXS.reshape(B * T, I, -1)
    score_BTS = (weights_BTI.float().reshape(B * T, 1, I) @ score_NIS).reshape(B, T, -1)
    entry_S = torch.arange(score_BTS.shape[-1], device=score_BTS.device)
    score_BTS.masked_fill_(entry_S >= visible_BT[..., None], -torch.inf)
    return torch.topk(score_BTS, k, dim=-1, sorted=False).indices


def decode(
    q_BTHK: Tensor,
    window_BRK: Tensor,
    window_mask_BTR: Tensor,
    pool_LBSK: Tensor,
    layer: Tensor,
    indices_BTk: Tensor,
    sink_H: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Attention to the window and the gathered entries, concatenated."""
    near_BTRK = window_BRK[:, None].expand(-1, q_BTHK.shape[1], -1, -1)
    far_BTkK, exists_BTk = _gathered(pool_LBSK[layer], indices_BTk)
    keys_BTNK = torch.cat([near_BTRK, far_BTkK], dim=2)
    return _attend(q_BTHK, keys_BTNK, torch.cat([window_mask_BTR, exists_BTk], 2), sink_H, scale)


def prefill(
    q_BTHK: Tensor,
    window_BXK: Tensor,
    start_B: Tensor,
    pool_LBSK: Tensor,
    layer: Tensor,
    indices_BTk: Tensor,
    sink_H: Tensor,
    *,
    window: int,
    scale: float,
) -> Tensor:
    """Like `decode`, with each query's own rows of the window."""
    T, device = q_BTHK.shape[1], q_BTHK.device
    row_Tr = torch.arange(T, device=device)[:, None] + 1 + torch.arange(window, device=device)
    far_BTkK, exists_BTk = _gathered(pool_LBSK[layer], indices_BTk)
    keys_BTNK = torch.cat([window_BXK[:, row_Tr], far_BTkK], dim=2)
    valid_BTr = start_B[:, None, None] - window + row_Tr >= 0
    return _attend(q_BTHK, keys_BTNK, torch.cat([valid_BTr, exists_BTk], dim=2), sink_H, scale)


def linear(x_RK: Tensor, w_NK: Tensor) -> Tensor:
    """One bfloat16 matmul."""
    return torch.matmul(x_RK, w_NK.T)


def expert_mlp(
    x_TD: Tensor,
    expert_TA: Tensor,
    weight_TA: Tensor,
    w1_LEFD: Tensor,
    w3_LEFD: Tensor,
    w2_LEDF: Tensor,
    layer: Tensor,
    *,
    limit: float,
    weight_first: bool,
) -> Tensor:
    """Rows sorted by expert, three grouped products."""
    A, experts = expert_TA.shape[1], w1_LEFD.shape[1]
    expert_P, order_P = torch.sort(expert_TA.reshape(-1), stable=True)
    token_P, weight_P1 = order_P // A, weight_TA.reshape(-1)[order_P][:, None]
    end_E = torch.searchsorted(
        expert_P, torch.arange(experts, device=x_TD.device, dtype=expert_P.dtype), right=True
    )
    grouped = lambda x, w: functional.grouped_mm(x, w[layer].transpose(1, 2), offs=end_E.int())
    x_PD = x_TD[token_P]
    gate_PF = grouped(x_PD, w1_LEFD).float().clamp(max=limit)
    hidden_PF = functional.silu(gate_PF) * grouped(x_PD, w3_LEFD).float().clamp(-limit, limit)
    if weight_first:
        hidden_PF = hidden_PF * weight_P1
    out_PD = grouped(hidden_PF.to(x_TD.dtype), w2_LEDF).float()
    if not weight_first:
        out_PD = out_PD * weight_P1
    return torch.zeros_like(x_TD, dtype=torch.float32).index_add_(0, token_P, out_PD)


_FORMS: dict[str, Callable[..., Any]] = {
    "indexer_topk.select": select,
    "sparse_attention.decode": decode,
    "sparse_attention.prefill": prefill,
    "quantize.linear": linear,
    "grouped_matmul.expert_mlp": expert_mlp,
}


def _dots(a_BXJ: Tensor, b_BJS: Tensor) -> Tensor:
    """Bfloat16 matmul with float32 accumulation, which torch has on GPUs only."""
    if a_BXJ.is_cuda:
        return torch.bmm(a_BXJ, b_BJS, out_dtype=torch.float32)
    return a_BXJ.float() @ b_BJS.float()


def _gathered(pool_BSK: Tensor, indices_BTk: Tensor) -> tuple[Tensor, Tensor]:
    """The listed entries, and a mask of those that exist."""
    row_B11 = torch.arange(len(pool_BSK), device=pool_BSK.device)[:, None, None]
    return pool_BSK[row_B11, indices_BTk.clamp(min=0).long()], indices_BTk >= 0


def _attend(
    q_BTHK: Tensor, keys_BTNK: Tensor, mask_BTN: Tensor, sink_H: Tensor, scale: float
) -> Tensor:
    """All heads of a query share one key head; the sink is the bias of an extra zero key."""
    B, T, H, K = q_BTHK.shape
    keys_XNK = functional.pad(keys_BTNK.reshape(B * T, -1, K), (0, 0, 1, 0))[:, None]
    mask_XN = mask_BTN.reshape(B * T, 1, 1, -1).expand(-1, -1, H, -1)
    bias_XN = torch.zeros(mask_XN.shape, dtype=q_BTHK.dtype, device=q_BTHK.device)
    bias_XN = bias_XN.masked_fill_(~mask_XN, -torch.inf)
    sink_XH1 = sink_H.to(q_BTHK.dtype)[None, None, :, None].expand(B * T, 1, -1, -1)
    bias_XN = torch.cat([sink_XH1, bias_XN], dim=-1)
    q_XHK = q_BTHK.reshape(B * T, 1, H, K)
    out_XHK = functional.scaled_dot_product_attention(
        q_XHK, keys_XNK, keys_XNK, attn_mask=bias_XN, scale=scale
    )
    return out_XHK.reshape(B, T, H, K)
