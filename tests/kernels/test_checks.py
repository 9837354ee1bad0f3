"""Every argument the primitive refuses, and what it says."""

from __future__ import annotations

import pytest
import torch

from logitcache.errors import ObjectiveError
from logitcache.kernels import HeadOptions, head_statistics, linear_gather

H, W, IDS = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([[0, 4], [-1, -1]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": [1.0]}, "hidden is a list"),
        ({"hidden": H[None]}, "flatten"),
        ({"weight": W.long()}, "weight is torch.int64"),
        ({"weight": W[:, :2]}, "width 2"),
        ({"weight": W[:0]}, "no rows"),
        ({"weight": W.to("meta")}, "meta"),
        ({"ids": IDS[:1]}, "needs \\[2, K\\]"),
        ({"ids": IDS.int()}, "use int64"),
        ({"ids": IDS + 1}, "holds 5, but the head has only 5"),
        ({"ids": torch.tensor([[0, 1], [2, 2]])}, "repeats an id in row 1"),
        ({"ids": IDS.to("meta")}, "ids is on meta"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"impl": "fast"}, "auto, reference, split, chunk, triton"),
        ({"impl": "triton", "weight": W.double()}, 'triton" has no float64'),
        ({"head": HeadOptions(bias=torch.zeros(4))}, "needs shape \\(5,\\)"),
        ({"head": HeadOptions(softcap=0.0)}, "softcap is 0.0"),
        ({"head": HeadOptions(logit_scale=float("inf"))}, "logit_scale is inf"),
        ({"head": HeadOptions(valid_vocab=6)}, "valid_vocab is 6"),
        ({"head": HeadOptions(valid_vocab=4)}, "only 4 valid columns"),
    ],
)
def test_refused(change, words):
    arguments = {"hidden": H, "weight": W, "ids": IDS, **change}
    tensors = [arguments.pop(name) for name in ("hidden", "weight", "ids")]
    with pytest.raises(ObjectiveError, match=words):
        linear_gather(*tensors, **arguments)
    if not {"temperature", "impl"} & set(change):
        with pytest.raises(ObjectiveError, match=words):
            head_statistics(*tensors, **arguments)
