"""What usually went wrong where a cache is not what its teacher says, and which of it fits the rows."""

from __future__ import annotations

from dataclasses import dataclass

from logitcache.audit.picked import PickedRows
from logitcache.audit.recompute import View
from logitcache.store import Identity


@dataclass(frozen=True)
class Suspicion:
    """A way in which the teacher's rows may have been made, and how that is said."""

    view: View
    says: str


def suspicions_of(identity: Identity, picked: PickedRows) -> list[Suspicion]:
    """Rows one position off, and a BOS or EOS that the teacher was given but the cache was not, or the other way."""
    tried = [
        Suspicion(View(shift=-1), "the row of position t is the teacher's of position t - 1: rows stand one too late"),
        Suspicion(View(shift=1), "the row of position t is the teacher's of position t + 1: rows stand one too early"),
    ]
    for name in ("bos", "eos"):
        number = identity.tokenizer.get(f"{name}_id")
        if isinstance(number, int) and 0 <= number < identity.vocab_size:
            before = f"{name.upper()} ({number}) before every block, which the cache's blocks do not have"
            tried.append(Suspicion(View(prefix=number), f"the teacher was given {before}"))
    first = picked.tokens[:, 0]
    if (first == first[0]).all() and picked.tokens.shape[1] > 1:
        begins = f"token {first[0]} with which every block begins"
        tried.append(Suspicion(View(dropped=1), f"the teacher was not given the {begins}"))
    return tried
