"""Operations that name positions are narrowed with the channels beside them."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ensemblenet import convert, fuse


class Messages(nn.Module):
    """Adds rows to rows, in a new tensor or in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.layers = nn.ModuleList([nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)])

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.relu())
            sums = torch.zeros_like(x)
            x = x + (sums.index_add_ if self.in_place else sums.index_add)(0, edges[1], x[edges[0]])
        return x


@pytest.mark.parametrize("in_place", [False, True])
def test_sums_of_rows_are_narrowed(in_place: bool) -> None:
    torch.manual_seed(0)
    x, edges = torch.randn(10, 8), torch.randint(10, (2, 30))
    model = convert(Messages(in_place), (x, edges), num_heads=2, split_at="input", shape="narrow")
    assert model.recipe is not None
    assert model.recipe.head.width < 0.8
    assert model.recipe.head.pinned == ()
    assert_close(fuse(model)(x, edges), model(x, edges))


def test_a_head_of_full_width_is_the_base() -> None:
    torch.manual_seed(0)
    x, edges = torch.randn(10, 8), torch.randint(10, (2, 30))
    base = Messages(in_place=False)
    assert_close(convert(base, (x, edges), num_heads=1, init="inherit")(x, edges)[0], base(x, edges))
