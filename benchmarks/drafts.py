"""Tokens a second of one stream with drafts of the MTP block, against none.

    python -m benchmarks.drafts [--preset bench] [--drafts 2] [--output benchmarks/results]

Two models with random weights: in one all logits are equal, so that every draft is right; in the
other hardly any is, and rows soon take none. Sides alternate; the best of five is reported.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.compare import append
from v4jax import presets
from v4jax.language_model import LanguageModel
from v4jax.model import numerics, params
from v4jax.model.transformer import Model

TURNS, TOKENS = 5, 192


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="bench")
    parser.add_argument("--drafts", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    # Without an end-of-sequence token, so that every answer is as long.
    cfg = dataclasses.replace(
        presets.get(args.preset), eos_token_ids=(), num_nextn_predict_layers=1
    )
    dtype = jnp.dtype(args.dtype)
    weights = params.init(Model(cfg), jax.random.key(0), dtype)
    model = LanguageModel(weights, cfg, numerics.HF, dtype)
    rows = []
    for agrees in (False, True):
        if agrees:
            weights.head_VD.set_value(jnp.zeros_like(weights.head_VD[...]))
        rates = _rates(model, (None, f"mtp:{args.drafts}"))
        rows.append({"preset": args.preset, "dtype": args.dtype, "agrees": agrees, **rates})
        print(f"{'all' if agrees else 'no'} drafts right: {rates}")
    append(rows, args.output / "drafts.jsonl")


def _rates(model: LanguageModel, sides: tuple[str | None, ...]) -> dict[str, Any]:
    best = dict.fromkeys(sides, 0.0)
    for turn in range(TURNS + 1):
        for side in sides:
            settings: Any = {"max_tokens": TOKENS, "temperature": 0.0, "speculate": side}
            out = model.generate(list(range(300, 364)), **settings)
            if turn:  # the first one compiles
                best[side] = max(best[side], out.timings.tokens_per_second)
    plain, drafting = best.values()
    return {
        "plain": round(plain, 1),
        "drafting": round(drafting, 1),
        "ratio": round(drafting / plain, 2),
    }


if __name__ == "__main__":
    main()
