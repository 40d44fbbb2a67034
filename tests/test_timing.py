"""Measurements take turns, and leave the random state alone."""

import torch
from torch import nn

from ensemblenet.timing import measure, step


def test_measurements_take_turns() -> None:
    calls: list[str] = []
    seconds = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert "".join(calls) == "abababab"  # the first of each is not counted
    assert seconds.keys() == {"a", "b"}


def test_a_step_trains_in_training_mode_only_and_draws_nothing_for_good() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5)), torch.randn(2, 8)
    torch.manual_seed(5)
    step(model.eval(), x)()
    assert model[0].weight.grad is None
    step(model.train(), x)()
    assert model[0].weight.grad is not None
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_every_step_casts_the_weights_anew() -> None:
    """One autocast around many steps keeps what it has cast; where each step has its own, each step casts."""
    model, x = nn.Linear(8, 4, bias=False).eval(), torch.ones(2, 8)
    outputs: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, args, out: outputs.append(out))
    for training in (True, False):
        run = step(model.train(training), x)
        with torch.autocast("cpu", torch.bfloat16):
            for value in (1.0, 2.0):
                model.weight.data.fill_(value)
                run()
    assert [out[0, 0].item() for out in outputs] == [8.0, 16.0, 8.0, 16.0]
