"""Wrong use is refused when the watch is attached, with a message that says what is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from foreshock.monitor import Watch
from tests.monitor.models import tiny, train


def test_wrong_use_is_refused_at_attach(start: Callable[..., Watch]) -> None:
    model, optimizer = tiny()
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    embedding = nn.Embedding(3, 3)
    sparse = torch.optim.SGD(embedding.parameters(), lr=0.1)
    meta = nn.Linear(2, 2, device="meta")
    lazy = nn.LazyLinear(2)
    cases: list[tuple[object, object, dict[str, Any], type[Exception], str]] = [
        (lambda: 0, optimizer, {}, TypeError, "needs a torch.nn.Module"),
        (model, "adam", {}, TypeError, "needs a torch.optim.Optimizer"),
        (model, other, {}, ValueError, "trains no parameter"),
        (embedding, sparse, {}, ValueError, "no linear layer found"),
        (meta, torch.optim.SGD(meta.parameters(), lr=1.0), {}, ValueError, "meta"),
        (model, optimizer, {"run": "a/b"}, ValueError, "run is 'a/b'"),
        (model, optimizer, {"run": "f" * 32}, ValueError, "looks like an id"),
        (model, optimizer, {"project": ".."}, ValueError, "project"),
        (model, optimizer, {"tensor_every": 0}, ValueError, "tensor_every is 0"),
        (model, optimizer, {"include": "nothing"}, ValueError, "leave none of 4"),
        (model, optimizer, {"include": "("}, ValueError, "no regular expression"),
        (model, optimizer, {"url": "ftp://x"}, ValueError, "http://"),
        (model, optimizer, {"config": {"x": "y" * 2**22}}, ValueError, r"4\.0 MiB as JSON"),
        (model, optimizer, {"url": "http://"}, ValueError, "http://host"),
        (model, optimizer, {"url": "http://x:84x0"}, ValueError, "http://host"),
        (model, optimizer, {"url": "http:// x"}, ValueError, "http://host"),
        (model, optimizer, {"collect": "relay:8421"}, ValueError, "collect is 'relay:8421'"),
        (lazy, torch.optim.SGD(lazy.parameters(), lr=1.0), {}, ValueError, "weight is still to be"),
        (model, optimizer, {"tensor_every": 1.5}, ValueError, "tensor_every is 1.5"),
        (model, optimizer, {"first_step": "a"}, ValueError, "first_step is 'a'"),
        (model, optimizer, {"tokens_per_step": 1.5}, ValueError, "tokens_per_step is 1.5"),
        (model, optimizer, {"budget": "1%"}, ValueError, "budget is 1%"),
        (model, optimizer, {"sinks": [3]}, ValueError, "cannot be called"),
        (model, optimizer, {"config": [1]}, ValueError, "not a dict"),
        (model, optimizer, {"first_step": -1}, ValueError, "first_step"),
        (model, optimizer, {"tokens_per_step": 0}, ValueError, "tokens_per_step"),
        (model, optimizer, {"config": {"f": print}}, ValueError, "plain data"),
    ]
    for case_model, case_optimizer, options, error, message in cases:
        with pytest.raises(error, match=message):
            start(case_model, case_optimizer, **options)
    with start(model, optimizer), pytest.raises(ValueError, match="watched already"):
        start(model, optimizer)
    train(model, optimizer, steps=1)
