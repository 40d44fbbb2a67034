"""Networks by hand on images and volumes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn

from kinds.entry import Entry


def block(inward: int, outward: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inward, outward, 3, stride, 1, bias=False), nn.BatchNorm2d(outward), nn.ReLU(inplace=True)
    )


class UNet(nn.Module):
    """Two levels, skips that are concatenated; sizes that are not even are padded as the skip needs."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = block(3, 8), block(8, 16), block(16, 32)
        self.up1, self.up2 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge1, self.merge2 = block(32, 16), block(16, 8)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.middle(F.max_pool2d(two, 2))
        x = self.merge1(torch.cat([self.fit(self.up1(x), two), two], dim=1))
        x = self.merge2(torch.cat([self.fit(self.up2(x), one), one], dim=1))
        return self.out(x)

    @staticmethod
    def fit(x: Tensor, skip: Tensor) -> Tensor:
        high, wide = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        return F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])


class AutoEncoder(nn.Module):
    """Convolutions down to a code, a linear layer, and up again."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(block(1, 8, 2), block(8, 16, 2), nn.Flatten(), nn.Linear(256, 32))
        self.decode = nn.Sequential(
            nn.Linear(32, 256), nn.ReLU(), nn.Unflatten(1, (16, 4, 4)), nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class VariationalAutoEncoder(nn.Module):
    """Samples in training; returns the image, the mean and the log of the variance."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(48, 8), nn.Linear(48, 8)
        self.decode = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code = self.encode(x)
        mean, log_variance = self.mean(code), self.log_variance(code)
        sample = mean
        if self.training:
            sample = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return self.decode(sample).view_as(x), mean, log_variance


class Sampler(nn.Module):
    """Draws in training, and takes the mean in evaluation."""

    def forward(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        if self.training:
            return mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return mean


class SampledAutoEncoder(VariationalAutoEncoder):
    """The same with its sampling in a module: what the refusal proposes."""

    def __init__(self) -> None:
        super().__init__()
        self.sample = Sampler()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code = self.encode(x)
        mean, log_variance = self.mean(code), self.log_variance(code)
        return self.decode(self.sample(mean, log_variance)).view_as(x), mean, log_variance


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        return x * self.gate(self.pool(x).view(b, c)).view(b, c, 1, 1).expand_as(x)


class SqueezeNet(nn.Module):
    """Squeeze and excite, written with linear layers and views."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(block(3, 16), SqueezeExcite(16), block(16, 32, 2), SqueezeExcite(32), block(32, 32))
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        return self.out(x.view(x.size(0), -1))


class DenseLayers(nn.Module):
    """Layers that read all before them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(16 + 8 * i), nn.ReLU(), nn.Conv2d(16 + 8 * i, 8, 3, 1, 1)) for i in range(4)
        )
        self.out = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.out(torch.cat(features, 1).mean(dim=[2, 3]))


class Mixer(nn.Module):
    """MLP-Mixer, all its shapes by einops."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4), nn.Linear(48, 32))
        self.mix = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Sequential(
                        nn.LayerNorm(32), Rearrange("b t c -> b c t"), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16),
                        Rearrange("b c t -> b t c"),
                    ),
                    nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)),
                ]
            )
            for _ in range(3)
        )  # fmt: skip
        self.out = nn.Sequential(nn.LayerNorm(32), Reduce("b t c -> b c", "mean"), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for tokens, channels in self.mix:
            x = x + tokens(x)
            x = x + channels(x)
        return self.out(x)


class EinopsViT(nn.Module):
    """A vision transformer as many copy it: rearrange, repeat, einsum."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Linear(48, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.project = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(2)
        )
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4))
        x = torch.cat((repeat(self.token, "() t c -> b t c", b=x.shape[0]), x), dim=1)
        x = x + self.position[:, : x.shape[1]]
        for i in range(2):
            q, k, v = self.qkv[i](self.norms[2 * i](x)).chunk(3, dim=-1)
            q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
            weights = (torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5).softmax(dim=-1)
            y = rearrange(torch.einsum("bhij,bhjd->bhid", weights, v), "b h n d -> b n (h d)")
            x = x + self.project[i](y)
            x = x + self.mlp[i](self.norms[2 * i + 1](x))
        return self.out(x[:, 0])


class DynamicConvolution(nn.Module):
    """Kernels of each example's own, run as groups: one group for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 8)
        self.kernels = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16 * 8 * 9))
        self.after = block(16, 32, 2)
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        kernels = self.kernels(x).view(b * 16, c, 3, 3)
        x = F.conv2d(x.reshape(1, b * c, h, w), kernels, padding=1, groups=b).view(b, 16, h, w)
        return self.out(self.after(x).mean((2, 3)))


class ModulatedConv(nn.Module):
    """As in StyleGAN 2: a style scales the weight for each example, which is then normalised."""

    def __init__(self, inward: int, outward: int, style: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outward, inward, 3, 3) / math.sqrt(9 * inward))
        self.style = nn.Linear(style, inward)
        nn.init.ones_(self.style.bias)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weight = self.weight[None] * self.style(style)[:, None, :, None, None]
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        out = F.conv2d(x.reshape(1, b * c, h, w), weight.reshape(-1, c, 3, 3), padding=1, groups=b)
        return out.reshape(b, -1, h, w)


class StyleGenerator(nn.Module):
    """A mapping network and modulated convolutions on a learned constant."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2))
        self.constant = nn.Parameter(torch.randn(1, 16, 4, 4))
        self.conv1, self.conv2 = ModulatedConv(16, 16, 32), ModulatedConv(16, 12, 32)
        self.rgb = nn.Conv2d(12, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        style = self.mapping(z / (z.pow(2).mean(dim=1, keepdim=True) + 1e-8).sqrt())
        x = self.constant.repeat(z.shape[0], 1, 1, 1)
        x = F.leaky_relu(self.conv1(x, style), 0.2)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.rgb(F.leaky_relu(self.conv2(x, style), 0.2))


class ConditionedByFiLM(nn.Module):
    """Images and a condition that scales and shifts their features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.film = nn.ModuleList(nn.Linear(6, 32) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, 1, 1) for _ in range(2))
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        x = self.stem(x)
        for film, conv in zip(self.film, self.convs, strict=True):
            gamma, beta = film(cond).chunk(2, dim=1)
            x = x + F.relu(conv(x) * (1 + gamma[:, :, None, None]) + beta[:, :, None, None])
        return self.out(x.mean((2, 3)))


class SpatialTransformer(nn.Module):
    """The image is turned by angles that a small network finds."""

    def __init__(self) -> None:
        super().__init__()
        self.locate = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 6)
        )
        nn.init.normal_(self.locate[-1].weight, std=0.01)
        self.locate[-1].bias.data.copy_(torch.tensor([1, 0, 0, 0, 1, 0], dtype=torch.float))
        self.features = nn.Sequential(block(1, 16), block(16, 32, 2), block(32, 32, 2))
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.locate(x).view(-1, 2, 3), list(x.size()), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
        return self.out(self.features(x).mean(dim=(-2, -1)))


class SpectralLayer(nn.Module):
    """The lowest frequencies times a complex weight."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(width, width, modes, modes, dtype=torch.cfloat) / width)

    def forward(self, x: Tensor) -> Tensor:
        m = self.modes
        spectrum = torch.fft.rfft2(x)
        out = torch.zeros(*x.shape[:-1], x.size(-1) // 2 + 1, dtype=torch.cfloat, device=x.device)
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :m, :m], self.weight)
        return torch.fft.irfft2(out, s=(x.size(-2), x.size(-1)))


class FourierOperator(nn.Module):
    """A Fourier neural operator on a grid, whose coordinates are made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Conv2d(3, 12, 1)
        self.spectral = nn.ModuleList(SpectralLayer(12, 4) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv2d(12, 12, 1) for _ in range(2))
        self.project = nn.Sequential(nn.Conv2d(12, 32, 1), nn.GELU(), nn.Conv2d(32, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        rows = torch.linspace(0, 1, h, device=x.device).view(1, 1, h, 1).expand(b, 1, h, w)
        columns = torch.linspace(0, 1, w, device=x.device).view(1, 1, 1, w).expand(b, 1, h, w)
        x = self.lift(torch.cat([x, rows, columns], dim=1))
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x) + local(x))
        return self.project(x)


class FeaturePyramid(nn.Module):
    """Three levels, each with boxes and classes, in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16, 2)
        self.stages = nn.ModuleList([block(16, 16, 2), block(16, 24, 2), block(24, 32, 2)])
        self.lateral = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in (16, 24, 32))
        self.smooth = nn.ModuleList(nn.Conv2d(16, 16, 3, 1, 1) for _ in range(3))
        self.classes, self.boxes = nn.Conv2d(16, 2 * 3, 3, 1, 1), nn.Conv2d(16, 2 * 4, 3, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        maps = [lateral(level) for lateral, level in zip(self.lateral, levels, strict=True)]
        for i in (1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[-2:], mode="nearest")
        maps = [smooth(level) for smooth, level in zip(self.smooth, maps, strict=True)]
        n = x.shape[0]
        classes = [self.classes(level).permute(0, 2, 3, 1).reshape(n, -1, 3) for level in maps]
        boxes = [self.boxes(level).permute(0, 2, 3, 1).reshape(n, -1, 4) for level in maps]
        return {"classes": torch.cat(classes, dim=1), "boxes": torch.cat(boxes, dim=1)}


class Capsules(nn.Module):
    """Dynamic routing between capsules; the lengths of the last are the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 5, 2)
        self.primary = nn.Conv2d(16, 32, 3, 2)
        self.weight = nn.Parameter(torch.randn(1, 16, 5, 6, 8) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary(F.relu(self.conv(x)))
        primary = self.squash(x.view(x.size(0), 8, -1).transpose(1, 2))  # (N, capsules, 8)
        votes = (self.weight @ primary[:, :, None, :, None]).squeeze(-1)  # (N, capsules, 5, 6)
        logits = torch.zeros(x.size(0), votes.size(1), 5, 1, device=x.device)
        for turn in range(3):
            out = self.squash((F.softmax(logits, dim=2) * votes).sum(dim=1, keepdim=True))
            if turn < 2:
                logits = logits + (votes * out).sum(dim=-1, keepdim=True)
        return out.squeeze(1).norm(dim=-1)

    @staticmethod
    def squash(x: Tensor) -> Tensor:
        square = (x**2).sum(dim=-1, keepdim=True)
        return square / (1 + square) * x / torch.sqrt(square + 1e-8)


class Siamese(nn.Module):
    """One encoder for both images; the distance decides."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(block(1, 16, 2), block(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.out = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.out(torch.abs(self.encoder(x1) - self.encoder(x2)))


class PixelShuffler(nn.Module):
    """Super-resolution: residual blocks and a pixel shuffle, on top of an interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), nn.PReLU(16), nn.Conv2d(16, 16, 3, 1, 1)) for _ in range(3)
        )
        self.up = nn.Sequential(nn.Conv2d(16, 12, 3, 1, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for layer in self.body:
            y = y + 0.1 * layer(y)
        return self.up(y) + F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class PoseDetector(nn.Module):
    """Heat maps whose expected places are the points: a soft argmax over coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(block(3, 16, 2), block(16, 32), nn.Conv2d(32, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(x)
        n, k, h, w = maps.shape
        weights = maps.view(n, k, -1).softmax(-1).view(n, k, h, w)
        down = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype)
        across = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype)
        return torch.stack([(weights.sum(2) * across).sum(-1), (weights.sum(3) * down).sum(-1)], dim=-1)


def pixels(channels: int) -> object:
    return lambda n, size: torch.randn(n, channels, size, size)


IMAGES = [
    Entry("U-Net", UNet, pixels(3), 16, (24, 18)),
    Entry("autoencoder", AutoEncoder, pixels(1), 16),
    Entry("variational autoencoder", VariationalAutoEncoder, pixels(1), 8, output=[0, 1, 2], way=SampledAutoEncoder),
    Entry("squeeze and excite", SqueezeNet, pixels(3), 16, (24, 13)),
    Entry("dense layers", DenseLayers, pixels(3), 16, (24, 13)),
    Entry("MLP-Mixer by einops", Mixer, pixels(3), 16),
    Entry("ViT by einops", EinopsViT, pixels(3), 16, (12,)),
    Entry("dynamic convolution", DynamicConvolution, pixels(3), 12, (16, 9)),
    Entry("StyleGAN generator", StyleGenerator, lambda n, s: torch.randn(n, s), 16),
    Entry("FiLM", ConditionedByFiLM, lambda n, s: (torch.randn(n, 3, s, s), torch.randn(n, 6)), 12, (16, 9)),
    Entry("spatial transformer", SpatialTransformer, pixels(1), 16, (24, 13)),
    Entry("Fourier operator", FourierOperator, pixels(1), 16, (24, 12)),
    Entry("feature pyramid", FeaturePyramid, pixels(3), 32, (48, 40), output=["classes", "boxes"]),
    Entry("capsules", Capsules, pixels(1), 16),
    Entry("siamese", Siamese, lambda n, s: {"x1": torch.randn(n, 1, s, s), "x2": torch.randn(n, 1, s, s)}, 16, (24,)),
    Entry("pixel shuffle", PixelShuffler, pixels(3), 12, (16, 9)),
    Entry("soft argmax", PoseDetector, pixels(3), 16, (24, 13)),
]
