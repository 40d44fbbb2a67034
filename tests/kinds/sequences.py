"""Networks by hand on sequences: recurrent, convolutional and attending."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from kinds.entry import Entry


class GRUClassifier(nn.Module):
    """Token numbers, a GRU, its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.gru = nn.GRU(24, 32, batch_first=True)
        self.classifier = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, ids: Tensor) -> Tensor:
        _, state = self.gru(self.embedding(ids))
        return self.classifier(state[-1])


class LSTMTagger(nn.Module):
    """Two layers of LSTM; one output for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.lstm = nn.LSTM(24, 32, num_layers=2, batch_first=True, dropout=0.1)
        self.tags = nn.Linear(32, 7)

    def forward(self, ids: Tensor) -> Tensor:
        out, _ = self.lstm(self.embedding(ids))
        return self.tags(out).transpose(1, 2)  # (N, C, L)


class BiLSTM(nn.Module):
    """Both directions; the mean over the tokens that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24, padding_idx=0)
        self.lstm = nn.LSTM(24, 24, batch_first=True, bidirectional=True)
        self.classifier = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 4))

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).unsqueeze(-1).float()
        out, _ = self.lstm(self.embedding(ids))
        return self.classifier((out * mask).sum(1) / mask.sum(1).clamp(min=1))


class LoopedCells(nn.Module):
    """Two GRU cells, one above the other, in a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRUCell(6, 24)
        self.second = nn.GRUCell(24, 32)
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        low = x.new_zeros(x.shape[0], 24)
        high = x.new_zeros(x.shape[0], 32)
        for t in range(x.shape[1]):
            low = self.first(x[:, t], low)
            high = self.second(low, high)
        return self.out(high)


class RecurrentByHand(nn.Module):
    """An Elman network of plain linear layers, its first state learned."""

    def __init__(self) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.randn(32) * 0.1)
        self.encode = nn.Linear(6, 32)
        self.step = nn.Linear(64, 32)
        self.out = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 4))

    def forward(self, x: Tensor) -> Tensor:
        state = self.state.expand(x.size(0), -1)
        for part in torch.tanh(self.encode(x)).unbind(1):
            state = torch.tanh(self.step(torch.cat([part, state], dim=-1)))
        return self.out(state)


class PaddedEncoder(nn.Module):
    """nn.TransformerEncoder with a mask of the padding, True where a token is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.register_buffer("positions", sinusoids(64, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.classifier = nn.Linear(32, 5)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        x = self.embedding(ids) * math.sqrt(32) + self.positions[: ids.shape[1]]
        x = self.encoder(x, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1).to(x.dtype)
        return self.classifier((x * kept).sum(1) / kept.sum(1))


def sinusoids(length: int, width: int) -> Tensor:
    position = torch.arange(length).unsqueeze(1)
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    table = torch.zeros(length, width)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)
    return table


class CausalBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.register_buffer("mask", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.qkv(self.norm1(x)).split(c, dim=2)
        q, k, v = (part.view(b, t, self.heads, c // self.heads).transpose(1, 2) for part in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
        out = (F.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous().view(b, t, c)
        x = x + self.proj(out)
        return x + self.mlp(self.norm2(x))


class CausalTransformer(nn.Module):
    """As in many tutorials: a mask in a buffer, positions by arange, the classifier tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 32)
        self.positions = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(CausalBlock(32, 4) for _ in range(3))
        self.norm = nn.LayerNorm(32)
        self.classifier = nn.Linear(32, 40, bias=False)
        self.tokens.weight = self.classifier.weight

    def forward(self, ids: Tensor) -> Tensor:
        _, t = ids.size()
        assert t <= 64
        x = self.tokens(ids) + self.positions(torch.arange(0, t, dtype=torch.long, device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x))


class RelativeBias(nn.Module):
    """Attention with a learned bias for each distance, and scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(6, 32)
        self.bias = nn.Parameter(torch.randn(4, 2 * 32 - 1) * 0.1)
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32)) for _ in range(2))
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        n, length, _ = x.shape
        at = torch.arange(length, device=x.device)
        bias = self.bias[:, at[:, None] - at[None, :] + 31]  # (heads, L, L)
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = qkv(x).view(n, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = x + y.transpose(1, 2).reshape(n, length, 32)
            x = x + mlp(x)
        return self.out(x.mean(1))


class Rotary(nn.Module):
    """Rotary positions and RMS norms by hand, gated units."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.q, self.kv, self.o = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.scale = nn.Parameter(torch.ones(32))
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.classifier = nn.Linear(32, 6)

    def rotate(self, x: Tensor) -> Tensor:  # (N, heads, L, 8)
        rate = 1.0 / 100.0 ** (torch.arange(0, 8, 2, device=x.device).float() / 8)
        angle = torch.outer(torch.arange(x.shape[-2], device=x.device).float(), rate)
        cos, sin = angle.cos(), angle.sin()
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        n, length, _ = x.shape
        h = self.norm(x)
        q = self.rotate(self.q(h).view(n, length, 4, 8).transpose(1, 2))
        k, v = self.kv(h).chunk(2, dim=-1)  # two groups of keys
        k = self.rotate(k.view(n, length, 2, 8).transpose(1, 2)).repeat_interleave(2, dim=1)
        v = v.view(n, length, 2, 8).transpose(1, 2).repeat_interleave(2, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(n, length, -1))
        x = x + self.down(F.silu(self.gate(self.norm(x))) * self.up(self.norm(x)))
        return self.classifier(x[:, -1])


class LengthFirst(nn.Module):
    """nn.TransformerEncoder in its old layout, (L, N, C), with a causal mask made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(6, 32)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1), 2)
        self.out = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x).transpose(0, 1)  # (L, N, C)
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(0))
        return self.out(self.encoder(x, mask=mask)[-1])


class Translator(nn.Module):
    """nn.Transformer with sources and targets."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(30, 32), nn.Embedding(30, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        self.out = nn.Linear(32, 30)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        mask = torch.triu(torch.full((tgt.shape[1], tgt.shape[1]), float("-inf")), diagonal=1)
        return self.out(self.transformer(self.source(src), self.target(tgt), tgt_mask=mask))


class Latents(nn.Module):
    """As in a Perceiver: learned latents attend to the input, then to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(8, 32) * 0.1)
        self.inward = nn.Linear(6, 32)
        self.cross = nn.MultiheadAttention(32, 4, batch_first=True)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        latents = self.latents.unsqueeze(0).repeat(x.shape[0], 1, 1)
        latents = latents + self.cross(latents, x, x, need_weights=False)[0]
        for layer in self.layers:
            latents = layer(latents)
        return self.out(latents.mean(dim=1))


class CausalConv(nn.Conv1d):
    """A convolution that sees the past alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class TemporalBlock(nn.Module):
    def __init__(self, inward: int, width: int, dilation: int) -> None:
        super().__init__()
        pad = 2 * dilation
        self.pad = pad
        self.conv1 = weight_norm(nn.Conv1d(inward, width, 3, padding=pad, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(width, width, 3, padding=pad, dilation=dilation))
        self.skip = nn.Conv1d(inward, width, 1) if inward != width else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x)[:, :, : -self.pad].contiguous())
        y = F.relu(self.conv2(y)[:, :, : -self.pad].contiguous())
        return F.relu(y + (x if self.skip is None else self.skip(x)))


class TCN(nn.Module):
    """Causal convolutions with weight norm; what is padded behind is cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(TemporalBlock(3, 16, 1), TemporalBlock(16, 24, 2), TemporalBlock(24, 24, 4))
        self.out = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(x)[:, :, -1])


class WaveNet(nn.Module):
    """Gated causal convolutions whose skips are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = CausalConv(1, 16, 2)
        self.gated = nn.ModuleList(CausalConv(16, 32, 2, dilation=2**i) for i in range(4))
        self.residual = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(4))
        self.skips = nn.ModuleList(nn.Conv1d(16, 24, 1) for _ in range(4))
        self.out = nn.Sequential(nn.ReLU(), nn.Conv1d(24, 24, 1), nn.ReLU(), nn.Conv1d(24, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        total = 0
        for gated, residual, skip in zip(self.gated, self.residual, self.skips, strict=True):
            value, gate = gated(x).chunk(2, dim=1)
            y = torch.tanh(value) * torch.sigmoid(gate)
            total = total + skip(y)
            x = x + residual(y)
        return self.out(total)


class NBeatsBlock(nn.Module):
    def __init__(self, back: int, ahead: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(back, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.backcast, self.forecast = nn.Linear(width, back), nn.Linear(width, ahead)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layers(x)
        return self.backcast(x), self.forecast(x)


class NBeats(nn.Module):
    """Blocks that each explain a part of the series; forecasts are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(NBeatsBlock(24, 6, 48) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        forecast = x[:, -1:]
        for block in self.blocks:
            backcast, part = block(x)
            x = x - backcast
            forecast = forecast + part
        return forecast


class SeriesTransformer(nn.Module):
    """Patches of a series by unfold, normalised by its own mean and deviation, which the forecast gets back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.position = nn.Parameter(torch.randn(1, 11, 32) * 0.02)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True), 2)
        self.out = nn.Linear(11 * 32, 12)

    def forward(self, x: Tensor) -> Tensor:  # (N, 48, 3)
        mean = x.mean(1, keepdim=True).detach()
        deviation = torch.sqrt(x.var(dim=1, keepdim=True, unbiased=False) + 1e-5).detach()
        x = ((x - mean) / deviation).transpose(1, 2)
        n, series, _ = x.shape
        x = x.unfold(-1, 8, 4).reshape(n * series, 11, 8)
        x = self.encoder(self.embed(x) + self.position)
        x = self.out(x.flatten(1)).view(n, series, 12).transpose(1, 2)
        return x * deviation + mean


class ControlledEquation(nn.Module):
    """Euler steps of a learned vector field along the path of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.Linear(4, 16)
        self.field = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16 * 4))
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = self.begin(x[:, 0])
        for t in range(1, x.shape[1]):
            change = (x[:, t] - x[:, t - 1]).unsqueeze(-1)
            state = state + torch.bmm(self.field(state).tanh().view(-1, 16, 4), change).squeeze(-1)
        return self.out(state)


class AudioCTC(nn.Module):
    """A spectrogram by torch.stft, convolutions, a GRU over time; log-probabilities for CTC."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(32))
        self.conv = nn.Sequential(nn.Conv2d(1, 8, 3, (2, 1), 1), nn.BatchNorm2d(8), nn.Hardtanh(0, 20))
        self.project = nn.Linear(8 * 9, 32)
        self.gru = nn.GRU(32, 32, batch_first=True, bidirectional=True)
        self.out = nn.Linear(64, 12)

    def forward(self, wave: Tensor) -> Tensor:
        x = torch.stft(wave, 32, 16, window=self.window, return_complex=True).abs()
        x = self.conv(torch.log1p(x).unsqueeze(1))
        x = x.permute(0, 3, 1, 2).flatten(2)
        x, _ = self.gru(self.project(x))
        return F.log_softmax(self.out(x), dim=-1).permute(1, 0, 2).permute(1, 2, 0)  # (N, C, T)


class InceptionBlock(nn.Module):
    def __init__(self, inward: int) -> None:
        super().__init__()
        self.narrow = nn.Conv1d(inward, 8, 1, bias=False) if inward > 1 else nn.Identity()
        self.convs = nn.ModuleList(nn.Conv1d(8 if inward > 1 else 1, 8, k, padding="same") for k in (9, 5, 3))
        self.pool = nn.Sequential(nn.MaxPool1d(3, 1, 1), nn.Conv1d(inward, 8, 1))
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.narrow(x)
        return F.relu(self.norm(torch.cat([*(conv(narrow) for conv in self.convs), self.pool(x)], dim=1)))


class InceptionTime(nn.Module):
    """Convolutions of several lengths side by side, on series."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InceptionBlock(c) for c in (2, 32, 32))
        self.shortcut = nn.Sequential(nn.Conv1d(2, 32, 1), nn.BatchNorm1d(32))
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.shortcut(x)
        for block in self.blocks:
            x = block(x)
        return self.out(F.relu(x + skip).mean(-1))


class Rocket(nn.Module):
    """Random convolutions that are not learned, kept as buffers; a perceptron above their maxima and shares."""

    def __init__(self) -> None:
        super().__init__()
        for i, dilation in enumerate((1, 2, 4)):
            self.register_buffer(f"kernel{i}", torch.randn(16, 2, 5))
            self.register_buffer(f"bias{i}", torch.rand(16) - 0.5)
            setattr(self, f"dilation{i}", dilation)
        self.out = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for i in range(3):
            kernel, bias = getattr(self, f"kernel{i}"), getattr(self, f"bias{i}")
            y = F.conv1d(x, kernel, bias, padding="same", dilation=getattr(self, f"dilation{i}"))
            parts += [y.amax(-1), (y > 0).float().mean(-1)]
        return self.out(torch.cat(parts, dim=1))


class StateSpace(nn.Module):
    """A diagonal state-space layer, computed as one long convolution by FFT."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(3, 16)
        self.decay = nn.Parameter(torch.rand(16, 4))
        self.mix = nn.Parameter(torch.randn(16, 4) * 0.5)
        self.skip = nn.Parameter(torch.ones(16))
        self.out = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        u = self.inward(x).transpose(1, 2)  # (N, 16, L)
        length = u.shape[-1]
        steps = torch.arange(length, device=x.device)
        kernel = (self.mix.unsqueeze(-1) * torch.exp(-F.softplus(self.decay).unsqueeze(-1) * steps)).sum(1)
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length), n=2 * length)
        y = F.gelu(y[..., :length] + u * self.skip.unsqueeze(-1))
        return self.out(y.mean(-1))


def ids(n: int, length: int) -> Tensor:
    return torch.randint(1, 30, (n, length))


def series(channels: int) -> object:
    return lambda n, length: torch.randn(n, channels, length)


def steps(n: int, length: int) -> Tensor:
    return torch.randn(n, length, 6)


def padded(n: int, length: int) -> tuple[Tensor, Tensor]:
    lengths = torch.randint(length // 2, length + 1, (n, 1))
    padding = torch.arange(length) >= lengths
    return torch.randint(1, 50, (n, length)).masked_fill(padding, 0), padding


SEQUENCES = [
    Entry("GRU", GRUClassifier, ids, 12, (7, 20)),
    Entry("LSTM tagger", LSTMTagger, ids, 12, (7, 20)),
    Entry("bidirectional LSTM", BiLSTM, lambda n, s: padded(n, s)[0], 12, (7, 20)),
    Entry("loop of GRU cells", LoopedCells, steps, 8, (5, 11)),
    Entry("recurrence by hand", RecurrentByHand, steps, 8, (5, 11)),
    Entry("transformer encoder, padding", PaddedEncoder, padded, 12, (7, 20)),
    Entry("causal transformer, tied", CausalTransformer, ids, 12, (7, 20)),
    Entry("attention, relative bias", RelativeBias, steps, 12, (7, 20)),
    Entry("rotary, grouped keys", Rotary, ids, 12, (7, 20)),
    Entry("length-first transformer", LengthFirst, steps, 12, (7, 20)),
    Entry("nn.Transformer", Translator, lambda n, s: {"src": ids(n, s), "tgt": ids(n, s - 3)}, 12, (7, 20)),
    Entry("latents, cross-attention", Latents, steps, 12, (7, 20)),
    Entry("TCN, weight norm", TCN, series(3), 32, (20, 48)),
    Entry("WaveNet", WaveNet, series(1), 32, (20, 48)),
    Entry("N-BEATS", NBeats, lambda n, s: torch.randn(n, s), 24),
    Entry("series in patches", SeriesTransformer, lambda n, s: torch.randn(n, 48, s), 3, (1, 5)),
    Entry("controlled equation", ControlledEquation, lambda n, s: torch.randn(n, s, 4), 10, (6, 15)),
    Entry("audio for CTC", AudioCTC, lambda n, s: torch.randn(n, s), 320, (160, 480)),
    Entry("InceptionTime", InceptionTime, series(2), 32, (20, 48)),
    Entry("ROCKET", Rocket, series(2), 32, (20, 48)),
    Entry("state space by FFT", StateSpace, lambda n, s: torch.randn(n, s, 3), 32, (20, 48)),
]
