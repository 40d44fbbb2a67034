import torch
from torch import nn

from ensemblenet import Cost, measure_cost


def test_a_convolution_costs_what_the_textbook_says() -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1, bias=True)
    cost = measure_cost(layer, torch.zeros(4, 3, 10, 12))
    assert cost == Cost(parameters=8 * 3 * 9 + 8, macs=10 * 12 * 8 * 3 * 9)


def test_torchvisions_published_figures() -> None:
    """ResNet-18: 11,689,512 parameters and 1.814 GMACs, as its documentation states."""
    from torchvision.models import resnet18

    cost = measure_cost(resnet18(), torch.zeros(1, 3, 224, 224))
    assert cost.parameters == 11_689_512
    assert round(cost.macs / 1e9, 3) == 1.814


def test_measuring_attention_counts_its_products_and_leaves_no_trace() -> None:
    layer = nn.MultiheadAttention(16, 4, batch_first=True)

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    net = SelfAttention().train()
    fast = torch.backends.mha.get_fastpath_enabled()
    cost = measure_cost(net, torch.zeros(2, 5, 16))
    assert cost.macs == 5 * 16 * 16 * 4 + 2 * 5 * 5 * 16
    assert net.training
    assert layer.training
    assert torch.backends.mha.get_fastpath_enabled() == fast
