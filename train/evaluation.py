"""Evaluation during training: losses on held-out data, and samples of generated text."""

import itertools
from typing import Any

import jax
import numpy as np

from v4jax.language_model import LanguageModel

from . import preparation, step, trainable
from .data import dataset
from .data.documents import Documents
from .preparation import Setup
from .recipe import Recipe
from .trainable import Parts


class Evaluator:
    """Measures a model in training, on the same data each time."""

    def __init__(self, recipe: Recipe, prepared: Setup, held_out: list[Documents]) -> None:
        """Pack the data; compiles nothing yet."""
        self._recipe, self._setup = recipe, prepared
        self._run = step.evaluate(prepared.settings)
        batch = recipe.steps.batch // recipe.steps.parts
        part = preparation.packs_here(batch, 1, prepared.mesh)
        packed = preparation.held_out_packs(recipe, held_out)
        preparation.warn(note for packs in packed for note in packs.notes(waste=False))
        self._data = [dataset.batches([packs], batch=batch, part=part) for packs in packed]

    @property
    def has_work(self) -> bool:
        """Whether the recipe asks for any evaluation."""
        return bool(self._data or self._recipe.evaluation.prompts)

    def measure(self, parts: Parts) -> dict[str, Any]:
        """Mean losses over the files, `perplexity`, and `samples` of what the model writes."""
        results: dict[str, Any] = {}
        if self._data:
            results |= self._losses(parts)
        if self._recipe.evaluation.prompts and jax.process_count() == 1:
            results["samples"] = self._samples(parts)
        return results

    def _losses(self, parts: Parts) -> dict[str, float]:
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        add = lambda total, new: {k: total.get(k, 0.0) + float(v) for k, v in new.items()}
        batches = itertools.chain.from_iterable(map(dataset.iterate, self._data))
        for local in itertools.islice(batches, self._recipe.evaluation.batches):
            placed = preparation.place_batch(local, 1, self._setup.mesh)
            batch = {name: x[0] for name, x in placed.items()}
            new_sums, new_counts = jax.device_get(self._run(parts, batch))
            sums, counts = add(sums, new_sums), add(counts, new_counts)
        means = {name: sums[name] / max(counts[name], 1.0) for name in sums}
        return means | {"perplexity": float(np.exp(means["loss"]))}

    def _samples(self, parts: Parts) -> list[dict[str, str]]:
        settings, evaluation = self._setup.settings, self._recipe.evaluation
        model = trainable.join(parts, settings.cfg, settings.what)
        dtype = np.dtype(self._recipe.model.dtype)
        how = settings.cfg, settings.numerics, dtype, self._setup.tokenizer
        prompts = [*evaluation.prompts]
        texts = LanguageModel(model, *how).generate(
            prompts, max_tokens=evaluation.tokens, temperature=0.0, progress=lambda *_: None
        )
        return [
            {"prompt": prompt, "text": answer.text}
            for prompt, answer in zip(prompts, texts, strict=True)
        ]
