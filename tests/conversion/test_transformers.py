"""Networks of the transformers library, small and random, whose masks hang on the words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ensemblenet
from ensemblenet import ConversionError

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 6, 7, 8, 9, 0], [5, 6, 7, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
FULL = torch.randint(1, 100, (3, 6), generator=torch.Generator().manual_seed(0))
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


class OfWords(nn.Module):
    """A model whose mask is made from its words."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(input_ids=ids, attention_mask=(ids != 0).long()).logits


class OfOneTensor(OfWords):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).logits


def _bert() -> nn.Module:
    return OfWords(transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)))


def _distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(vocab_size=100, dim=64, n_layers=1, n_heads=4, hidden_dim=128)
    return OfWords(transformers.DistilBertForSequenceClassification(config))


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=100, n_embd=64, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return OfWords(transformers.GPT2LMHeadModel(config))


def _deberta() -> nn.Module:
    config = transformers.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"])
    return OfWords(transformers.DebertaV2ForSequenceClassification(config))


def _llama() -> nn.Module:
    return OfWords(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)))


@pytest.mark.parametrize("make", [_bert, _distilbert, _gpt2, _deberta, _llama])
def test_masks_are_followed_for_any_words(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    base = make().eval()
    # traced on words without padding, where the library would leave the mask out
    model = ensemblenet.convert(base, FULL, 1, 5.0, split_at="input", init="inherit").eval()
    with torch.no_grad():
        for ids in (FULL, IDS):
            torch.testing.assert_close(model(ids), base(ids), rtol=1e-4, atol=1e-5)


def test_heads_of_an_encoder_are_narrow() -> None:
    assert ensemblenet.convert(_bert(), FULL, budget=0.9, split_at="input").recipe.head.width < 1


def test_a_vision_transformer_is_followed() -> None:
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
    )
    base, x = OfOneTensor(transformers.ViTForImageClassification(config)).eval(), torch.randn(2, 3, 32, 32)
    model = ensemblenet.convert(base, x, 1, 5.0, split_at="input", init="inherit").eval()
    torch.testing.assert_close(model(x), base(x), rtol=1e-4, atol=1e-5)


def _wav2vec2(**options: Any) -> nn.Module:
    config = transformers.Wav2Vec2Config(
        **{**SIZES, "vocab_size": 32}, conv_dim=(32,), conv_stride=(10,), conv_kernel=(10,), num_feat_extract_layers=1,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, classifier_proj_size=32, **options,
    )  # fmt: skip
    return OfOneTensor(transformers.Wav2Vec2ForSequenceClassification(config))


def test_layers_that_are_skipped_by_chance_are_refused_and_a_rate_of_zero_is_the_way_out() -> None:
    x = torch.randn(2, 400)
    with pytest.raises(ConversionError, match=r"test_transformers.py:\d+ (reads|draws) random numbers .*rate to zero"):
        ensemblenet.split_points(_wav2vec2(layerdrop=0.5, apply_spec_augment=False), x)
    with pytest.raises(ConversionError, match=r"test_transformers.py:\d+ draws random numbers in Python or NumPy"):
        ensemblenet.split_points(_wav2vec2(layerdrop=0.0, mask_time_prob=0.5, mask_time_length=2), x)
    assert len(ensemblenet.split_points(_wav2vec2(layerdrop=0.0, apply_spec_augment=False), x)) > 3


def test_rotary_positions_stay_exact_in_autocast() -> None:
    torch.manual_seed(0)
    base = _llama().eval()
    model = ensemblenet.convert(base, FULL, 1, 5.0, split_at="input", init="inherit").eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(FULL), base(FULL))
