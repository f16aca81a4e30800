"""An engine's parts, put together for a model."""

from collections.abc import Mapping

from v4jax.decoding.loaded import Loaded
from v4jax.engine import settings
from v4jax.engine.arrays import Static
from v4jax.engine.core import Core
from v4jax.engine.device import Device
from v4jax.engine.inputs import Shape
from v4jax.engine.memory import Memory
from v4jax.engine.pages import Pages
from v4jax.engine.prefix import Prefix
from v4jax.engine.scheduler import Scheduler
from v4jax.engine.settings import Settings
from v4jax.engine.store import Store
from v4jax.model import sharding
from v4jax.model.cache import BLOCK

# Stop tokens of a request besides the model's own.
STOPS = 8


def build(models: Mapping[str | None, Loaded], sizes: Settings) -> Core:
    """A core with an empty cache.

    Args:
      models: the base model, under None, and the same model with adapters by name.
      sizes: settings that were checked.
    """
    base = models[None]
    static = Static(
        cfg=base.config,
        numerics=base.numerics,
        drafts=sizes.drafts,
        top=sizes.top,
        scores=sizes.scores,
        experts=sizes.routed_experts,
    )
    page, pages = sizes.page or 0, sizes.pages or 0
    groups = sharding.row_groups(base.mesh)
    shape = Shape(
        rows=sizes.max_seqs,
        pages=pages,
        page=page,
        row_pages=-(-sizes.context // page),
        widths=(BLOCK, sizes.chunk),
        stops=STOPS + len(base.config.eos_token_ids),
        groups=groups,
        entries=sizes.cache_dtype,
    )
    weights = {name: model.weights for name, model in models.items()}
    device = Device(weights, shape, static, base.dtype)
    # What is forgotten with the process needs no more than the adapters' names.
    names = {name: name or "" for name in models}
    if sizes.cache_dir:
        names = {name: settings.fingerprint(w, static, shape) for name, w in weights.items()}
    store = None
    if sizes.cache_ram or sizes.cache_dir:
        store = Store(sizes.cache_ram, names[None], sizes.cache_dir, sizes.cache_disk)
    all_pages = Pages(pages, groups)
    prefix = Prefix(all_pages, page // BLOCK, sizes.snapshots, names[None])
    memory = Memory(device, all_pages, prefix, store, names, interval=sizes.interval)
    rows = {"rows": sizes.max_seqs, "groups": groups}
    scheduler = Scheduler(memory, chunk=sizes.chunk, width=device.width, **rows)
    return Core(scheduler, memory, device)
