"""DeepSeek-V4 in JAX: the model, its checkpoints and a compiled decode loop.

import v4jax
model = v4jax.load("path/to/checkpoint")
print(model.generate("Once upon a time", max_tokens=64).text)
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4jax import arguments
from v4jax.text.chat import encode_chat
from v4jax.text.chat_parser import parse_chat

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from jax.typing import DTypeLike

    from v4jax.engine.engine import Engine
    from v4jax.language_model import LanguageModel
    from v4jax.model import numerics as _numerics
    from v4jax.waiting import Progress

__all__ = ["Engine", "LanguageModel", "encode_chat", "load", "parse_chat"]


def _is_mesh(value: Any) -> bool:
    from v4jax.model import sharding

    return isinstance(value, sharding.Mesh) and value.axis_names == sharding.AXES


@arguments.renamed("keep", "keep_quantised")
@arguments.checked(
    path=arguments.PATH,
    dtype=arguments.dtype("bfloat16", "float32"),
    numerics=arguments.choice("official", "hf"),
    keep_quantised=arguments.FLAG,
    adapter=arguments.optional(arguments.PATH),
    mesh=arguments.optional(
        arguments.predicate("a mesh from v4jax.model.sharding.make_mesh", _is_mesh)
    ),
    revision=arguments.optional(arguments.TEXT),
    progress=arguments.optional(arguments.FUNCTION),
)
def load(
    path: str | Path,
    *,
    dtype: "DTypeLike" = "bfloat16",
    numerics: "_numerics.Name" = "official",
    keep_quantised: bool = False,
    adapter: str | Path | None = None,
    mesh: "Mesh | None" = None,
    revision: str | None = None,
    progress: "Progress | None" = None,
) -> "LanguageModel":
    """Load a checkpoint, ready to run.

    Args:
      path: a Hugging Face directory or a native checkpoint; the URL of either, such as
        gs://bucket/folder, if the extra 'bucket' is installed; or a Hub id.
      dtype: dtype of weights, activations and cache: 'bfloat16' or 'float32', by name or as a dtype
        of NumPy or JAX.
      numerics: 'official' rounds where DeepSeek's runtime does, 'hf' where transformers does.
      keep_quantised: keep FP8 and FP4 weights quantised in memory.
      adapter: a PEFT adapter (a directory or a Hub id) or the directory of a training run, whose
        newest state is used.
      mesh: mesh of devices to shard weights and cache over (`v4jax.model.sharding.make_mesh`);
        all calls of the model then run on it, and each host reads only what its devices hold. By
        default one device.
      revision: branch, tag or commit of a Hub id; the main branch by default.
      progress: called with the name of the present task, the amount done and the total; by
        default they are shown on a terminal and in a notebook.

    Raises:
      ValueError: the checkpoint is damaged or not DeepSeek-V4, an argument is invalid, or the mesh
        does not divide the weights.
    """
    # JAX and Flax are slow to import, so `import v4jax` does not.
    from v4jax import open_model

    return open_model.load(
        path,
        dtype,
        numerics,
        keep_quantised=keep_quantised,
        adapter=adapter,
        mesh=mesh,
        revision=revision,
        progress=progress,
    )


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from v4jax.engine.engine import Engine

        return Engine
    if name == "LanguageModel":
        from v4jax.language_model import LanguageModel

        return LanguageModel
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("v4jax")
    raise AttributeError(f"module 'v4jax' has no attribute {name!r}")
