"""Small DeepSeek-V4 models in transformers, with random weights, for parity tests."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

# More threads are slower on matrices this small, the more so next to another test worker.
torch.set_num_threads(1)

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    # With fewer heads ReLU scores tie exactly, and torch breaks ties arbitrarily.
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_hash_layers": 2,
    "sliding_window": 16,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}


def make(ratios: list[int] | None, seed: int, **changes: Any) -> DeepseekV4ForCausalLM:
    """A float32 model with weights large enough that routing and retrieval are not degenerate."""
    schedule = (
        {} if ratios is None else {"compress_ratios": ratios, "num_hidden_layers": len(ratios)}
    )
    config = DeepseekV4Config(**(SIZES | schedule | changes))
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.05 if "embed" not in name else 0.5)
            else:
                weight.normal_(1.0 if "norm" in name else 0.0, 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                rows = [torch.randperm(config.n_routed_experts) for _ in range(len(buffer))]
                buffer.copy_(torch.stack(rows)[:, : buffer.shape[1]])
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1)
    return model


def save(model: DeepseekV4ForCausalLM, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def logits(model: torch.nn.Module, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens_BT)).logits.numpy()


def greedy(model: DeepseekV4ForCausalLM, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation with transformers' own cache; end-of-sequence tokens are ignored."""
    with torch.no_grad():
        out = model(torch.tensor([prompt]), use_cache=True)
        tokens = []
        for _ in range(count):
            tokens.append(int(out.logits[0, -1].argmax()))
            out = model(
                torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True
            )
    return tokens
