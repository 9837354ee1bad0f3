"""distribution -> SparseTargets. `spec` and `random` are torch-free; the others run where the logits are."""

from logitcache.selection.random import block_uniforms, chunk_uniforms
from logitcache.selection.spec import Selection

__all__ = ["Selection", "block_uniforms", "chunk_uniforms"]
