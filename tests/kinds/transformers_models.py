"""Small networks of the library transformers, from their configurations, called as their users call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

from kinds.entry import Entry, Inputs

TEXT = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
SHORT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {**TEXT, **SHORT}
CAUSAL = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
IMAGE |= {"intermediate_size": 64, "num_labels": 5}
SPEECH = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "num_labels": 4,
    "conv_dim": (16, 16, 16), "conv_kernel": (8, 4, 4), "conv_stride": (4, 2, 2), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 24,
    "apply_spec_augment": False, "layerdrop": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0, "vocab_size": 20,
}  # fmt: skip


def text(n: int, length: int, types: bool = False, first: int = 5) -> dict[str, Tensor]:
    """As a tokenizer gives them: right-padded, a mask of 1 and 0."""
    lengths = torch.randint(length // 2, length + 1, (n, 1))
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    inputs = {"input_ids": torch.randint(first, 60, (n, length)) * mask, "attention_mask": mask}
    if types:
        inputs["token_type_ids"] = (torch.arange(length) >= lengths // 2).long() * mask
    return inputs


def ended(n: int, length: int) -> dict[str, Tensor]:
    """The last token of each example is the one of its end."""
    inputs = text(n, length)
    last = inputs["attention_mask"].sum(1, keepdim=True) - 1
    inputs["input_ids"] = inputs["input_ids"].scatter(1, last, 2)
    return inputs


def other_masks(types: bool = False) -> Callable[[], list[dict[str, Tensor]]]:
    """Batches without padding, and with the padding in front."""

    def make() -> list[dict[str, Tensor]]:
        whole, left = text(4, 12, types), text(4, 12, types)
        whole["attention_mask"] = torch.ones_like(whole["attention_mask"])
        whole["input_ids"] = torch.randint(5, 60, (4, 12))
        return [whole, {key: value.flip(1) for key, value in left.items()}]

    return make


def of_text(name: str, make: Callable[[], nn.Module], types: bool = False, **options: Any) -> Entry:
    inputs: Inputs = lambda n, s: text(n, s, types)  # noqa: E731
    return Entry(name, make, inputs, 12, (7, 20), others=other_masks(types), **options)


def of_images(name: str, make: Callable[[], nn.Module], size: int = 16, others: tuple[int, ...] = ()) -> Entry:
    return Entry(name, make, lambda n, s: {"pixel_values": torch.randn(n, 3, s, s)}, size, others)


def of_waves(name: str, make: Callable[[], nn.Module], **options: Any) -> Entry:
    def inputs(n: int, length: int) -> dict[str, Tensor]:
        lengths = torch.randint(length // 2, length + 1, (n, 1))
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        return {"input_values": torch.randn(n, length) * mask, "attention_mask": mask}

    return Entry(name, make, inputs, 800, (500, 1200), **options)


def waves(n: int, length: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(n, length)}


TEXT_MODELS = [
    of_text("BERT", lambda: t.BertForSequenceClassification(t.BertConfig(**BERT)), types=True),
    of_text("BERT, dropout", lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT)), types=True),
    of_text(
        "BERT, eager attention",
        lambda: t.BertForSequenceClassification(t.BertConfig(**BERT, attn_implementation="eager")), types=True,
    ),
    of_text("BERT tagger", lambda: t.BertForTokenClassification(t.BertConfig(**BERT)), types=True),
    of_text(
        "BERT, answers", lambda: t.BertForQuestionAnswering(t.BertConfig(**{**BERT, "num_labels": 2})), types=True,
        output=["start_logits", "end_logits"],
    ),
    of_text("BERT, masked words", lambda: t.BertForMaskedLM(t.BertConfig(**BERT))),
    of_text("RoBERTa", lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**BERT))),
    of_text("XLM-RoBERTa tagger", lambda: t.XLMRobertaForTokenClassification(t.XLMRobertaConfig(**BERT))),
    of_text(
        "DistilBERT",
        lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(
                vocab_size=60, dim=32, n_layers=3, n_heads=4, hidden_dim=64, max_position_embeddings=64, num_labels=3,
                dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
            )
        ),
    ),
    of_text(
        "ALBERT", lambda: t.AlbertForSequenceClassification(t.AlbertConfig(**BERT, embedding_size=16)), types=True
    ),
    of_text(
        "ELECTRA", lambda: t.ElectraForSequenceClassification(t.ElectraConfig(**BERT, embedding_size=16)), types=True
    ),
    of_text("DeBERTa", lambda: t.DebertaForSequenceClassification(t.DebertaConfig(
        **BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=32))),
    of_text("DeBERTa-v2", lambda: t.DebertaV2ForSequenceClassification(t.DebertaV2Config(
        **BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=16, norm_rel_ebd="layer_norm",
        share_att_key=True))),
    of_text("MPNet", lambda: t.MPNetForSequenceClassification(t.MPNetConfig(**BERT))),
    of_text("ConvBERT", lambda: t.ConvBertForSequenceClassification(t.ConvBertConfig(**BERT, embedding_size=32))),
    of_text("SqueezeBERT", lambda: t.SqueezeBertForSequenceClassification(t.SqueezeBertConfig(
        **BERT, embedding_size=32))),
    of_text("ModernBERT", lambda: t.ModernBertForSequenceClassification(t.ModernBertConfig(
        **TEXT, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2, local_attention=8))),
    of_text("FNet", lambda: t.FNetForSequenceClassification(t.FNetConfig(**TEXT, hidden_dropout_prob=0.0)),
            types=True),
    of_text("Funnel", lambda: t.FunnelForSequenceClassification(t.FunnelConfig(
        vocab_size=60, block_sizes=[2, 1], num_decoder_layers=1, d_model=32, n_head=4, d_head=8, d_inner=64,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, num_labels=3))),
    of_text("XLNet", lambda: t.XLNetForSequenceClassification(t.XLNetConfig(
        vocab_size=60, d_model=32, n_layer=3, n_head=4, d_inner=64, dropout=0.0, num_labels=3, use_mems_eval=False))),
    Entry("Nyströmformer", lambda: t.NystromformerForSequenceClassification(t.NystromformerConfig(
        **BERT, segment_means_seq_len=12, num_landmarks=12)), text, 12),
    of_text("RoFormer", lambda: t.RoFormerForSequenceClassification(t.RoFormerConfig(**BERT, embedding_size=32)),
            options={"init": "inherit"}),
    of_text("ESM", lambda: t.EsmForSequenceClassification(t.EsmConfig(
        **BERT, mask_token_id=3, position_embedding_type="rotary"))),
    of_text("T5 encoder", lambda: t.T5ForTokenClassification(t.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, dropout_rate=0.0, num_labels=3))),
    Entry("BART", lambda: t.BartForSequenceClassification(t.BartConfig(
        vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, num_labels=3,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)), ended, 12, (7, 20)),
    of_text("GPT-2", lambda: t.GPT2LMHeadModel(t.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2))),
    of_text("GPT-2, no cache", lambda: t.GPT2LMHeadModel(t.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, use_cache=False))),
    of_text("GPT-2 classifier", lambda: t.GPT2ForSequenceClassification(t.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0, num_labels=3))),
    of_text("GPT-NeoX", lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(
        **TEXT, use_cache=False, hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=1, eos_token_id=2))),
    of_text("GPT-Neo", lambda: t.GPTNeoForCausalLM(t.GPTNeoConfig(
        vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        intermediate_size=64, window_size=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        use_cache=False))),
    of_text("OPT", lambda: t.OPTForCausalLM(t.OPTConfig(
        vocab_size=60, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=64,
        max_position_embeddings=64, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False))),
    of_text("BLOOM", lambda: t.BloomForCausalLM(t.BloomConfig(
        vocab_size=60, hidden_size=32, n_layer=3, n_head=4, hidden_dropout=0.0, attention_dropout=0.0, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, use_cache=False))),
    of_text("Llama", lambda: t.LlamaForCausalLM(t.LlamaConfig(**CAUSAL))),
    of_text("Llama, no cache", lambda: t.LlamaForCausalLM(t.LlamaConfig(**CAUSAL, use_cache=False))),
    of_text("Llama classifier", lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**CAUSAL, use_cache=False))),
    of_text("Llama tagger", lambda: t.LlamaForTokenClassification(t.LlamaConfig(**CAUSAL, use_cache=False))),
    of_text("Mistral", lambda: t.MistralForCausalLM(t.MistralConfig(**CAUSAL, sliding_window=8, use_cache=False))),
    of_text("Qwen2", lambda: t.Qwen2ForCausalLM(t.Qwen2Config(
        **{k: v for k, v in CAUSAL.items() if k != "head_dim"}, use_cache=False))),
    of_text("Qwen3", lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**CAUSAL, use_cache=False))),
    of_text("Gemma", lambda: t.GemmaForCausalLM(t.GemmaConfig(**CAUSAL, use_cache=False))),
    of_text("Gemma 2", lambda: t.Gemma2ForCausalLM(t.Gemma2Config(
        **CAUSAL, sliding_window=8, query_pre_attn_scalar=8, use_cache=False))),
    of_text("Phi", lambda: t.PhiForCausalLM(t.PhiConfig(
        **{k: v for k, v in CAUSAL.items() if k != "head_dim"}, use_cache=False))),
    of_text("Falcon", lambda: t.FalconForCausalLM(t.FalconConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, use_cache=False))),
    of_text("Mamba", lambda: t.MambaForCausalLM(t.MambaConfig(
        vocab_size=60, hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, use_cache=False))),
    Entry(
        "T5", lambda: t.T5ForConditionalGeneration(t.T5Config(
            vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, use_cache=False,
            decoder_start_token_id=0)),
        lambda n, s: text(n, s) | {"decoder_input_ids": torch.randint(5, 60, (n, s - 4))}, 12, (8, 20), output="logits",
    ),
]  # fmt: skip

IMAGE_MODELS = [
    of_images("ViT", lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGE))),
    of_images("DeiT", lambda: t.DeiTForImageClassification(t.DeiTConfig(**IMAGE))),
    of_images("BEiT", lambda: t.BeitForImageClassification(t.BeitConfig(
        **IMAGE, use_relative_position_bias=True, drop_path_rate=0.0))),
    of_images("DINOv2", lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**IMAGE))),
    of_images("CLIP", lambda: t.CLIPForImageClassification(t.CLIPConfig(
        vision_config={**IMAGE}, text_config={**TEXT}, num_labels=5))),
    of_images("SigLIP", lambda: t.SiglipForImageClassification(t.SiglipConfig(
        vision_config={**IMAGE}, text_config={**TEXT}, num_labels=5))),
    of_images("Swin", lambda: t.SwinForImageClassification(t.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5,
        drop_path_rate=0.0)), 32),
    of_images("ConvNeXt", lambda: t.ConvNextForImageClassification(t.ConvNextConfig(
        hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 3, 1], num_labels=5)), 64, (96,)),
    of_images("ConvNeXt V2", lambda: t.ConvNextV2ForImageClassification(t.ConvNextV2Config(
        hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 3, 1], num_labels=5)), 64, (96,)),
    of_images("ResNet", lambda: t.ResNetForImageClassification(t.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], layer_type="basic", num_labels=5)), 64,
        (96,)),
    of_images("SegFormer", lambda: t.SegformerForImageClassification(t.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 40], num_attention_heads=[1, 2, 4, 4], num_labels=5,
        drop_path_rate=0.0, hidden_dropout_prob=0.0, classifier_dropout_prob=0.0)), 64, (96,)),
    of_images("SegFormer, pixels", lambda: t.SegformerForSemanticSegmentation(t.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 40], num_attention_heads=[1, 2, 4, 4], num_labels=5,
        decoder_hidden_size=32, drop_path_rate=0.0, hidden_dropout_prob=0.0, classifier_dropout_prob=0.0)), 64, (96,)),
    of_images("MobileViT", lambda: t.MobileViTForImageClassification(t.MobileViTConfig(
        image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 32], num_attention_heads=4,
        num_labels=5, hidden_dropout_prob=0.0, classifier_dropout_prob=0.0)), 64, (96,)),
    of_images("MobileNet V2", lambda: t.MobileNetV2ForImageClassification(t.MobileNetV2Config(
        depth_multiplier=0.25, num_labels=5)), 64, (96,)),
    of_images("PVT", lambda: t.PvtForImageClassification(t.PvtConfig(
        image_size=64, depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 40], num_attention_heads=[1, 2, 4, 4],
        drop_path_rate=0.0, num_labels=5)), 64),
    of_images("PVT v2", lambda: t.PvtV2ForImageClassification(t.PvtV2Config(
        image_size=64, depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 40], num_attention_heads=[1, 2, 4, 4],
        drop_path_rate=0.0, num_labels=5)), 64, (96,)),
    of_images("LeViT", lambda: t.LevitForImageClassification(t.LevitConfig(
        image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 4], depths=[1, 1, 1], key_dim=[8, 8, 8],
        drop_path_rate=0, num_labels=5)), 64),
    of_images("EfficientNet", lambda: t.EfficientNetForImageClassification(t.EfficientNetConfig(
        image_size=64, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, dropout_rate=0.0,
        drop_connect_rate=0.0, num_labels=5)), 64, (96,)),
    of_images("RegNet", lambda: t.RegNetForImageClassification(t.RegNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], groups_width=8, num_labels=5)), 64,
        (96,)),
    of_images("PoolFormer", lambda: t.PoolFormerForImageClassification(t.PoolFormerConfig(
        hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], drop_path_rate=0.0, num_labels=5)), 64, (96,)),
    of_images("CvT", lambda: t.CvtForImageClassification(t.CvtConfig(
        embed_dim=[16, 24, 32], num_heads=[1, 2, 4], depth=[1, 2, 3], num_labels=5)), 64),
    Entry("DPT", lambda: t.DPTForDepthEstimation(t.DPTConfig(
        **{**IMAGE, "image_size": 32, "patch_size": 8, "num_hidden_layers": 4, "num_labels": 1},
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
        reassemble_factors=[4, 2, 1, 0.5])),
        lambda n, s: {"pixel_values": torch.randn(n, 3, s, s)}, 32, output="predicted_depth"),
]  # fmt: skip

VIDEO = {**IMAGE, "num_frames": 4}


def frames(n: int, count: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, count, 3, 16, 16)}


OTHER_MODELS = [
    of_waves("Wav2Vec2", lambda: t.Wav2Vec2ForSequenceClassification(t.Wav2Vec2Config(**SPEECH))),
    Entry("Wav2Vec2, no mask", lambda: t.Wav2Vec2ForSequenceClassification(t.Wav2Vec2Config(**SPEECH)), waves, 800,
          (500, 1200)),
    of_waves("Wav2Vec2, CTC", lambda: t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**SPEECH))),
    of_waves("HuBERT", lambda: t.HubertForSequenceClassification(t.HubertConfig(**SPEECH))),
    of_waves("WavLM", lambda: t.WavLMForSequenceClassification(t.WavLMConfig(**SPEECH))),
    of_waves("SEW", lambda: t.SEWForSequenceClassification(t.SEWConfig(**SPEECH, squeeze_factor=2))),
    of_waves("UniSpeech", lambda: t.UniSpeechForSequenceClassification(t.UniSpeechConfig(**SPEECH))),
    Entry("AST", lambda: t.ASTForAudioClassification(t.ASTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, patch_size=8,
        frequency_stride=6, time_stride=6, max_length=40, num_mel_bins=32, num_labels=5)),
        lambda n, s: {"input_values": torch.randn(n, s, 32)}, 40),
    Entry("Whisper", lambda: t.WhisperForAudioClassification(t.WhisperConfig(
        d_model=32, encoder_layers=3, encoder_attention_heads=4, decoder_layers=1, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=20, max_source_positions=30, vocab_size=60,
        classifier_proj_size=24, num_labels=5, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1)),
        lambda n, s: {"input_features": torch.randn(n, 20, s)}, 60),
    Entry("VideoMAE", lambda: t.VideoMAEForVideoClassification(t.VideoMAEConfig(**VIDEO, tubelet_size=2)), frames, 4),
    Entry("TimeSformer", lambda: t.TimesformerForVideoClassification(t.TimesformerConfig(**VIDEO)), frames, 4),
    Entry("ViViT", lambda: t.VivitForVideoClassification(t.VivitConfig(
        **VIDEO, tubelet_size=[2, 4, 4])), frames, 4),
    Entry("PatchTST", lambda: t.PatchTSTForPrediction(t.PatchTSTConfig(
        num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, num_hidden_layers=3, d_model=32,
        num_attention_heads=4, ffn_dim=64, prediction_length=6, loss="mse")),
        lambda n, s: {"past_values": torch.randn(n, s, 3)}, 32, output="prediction_outputs"),
    Entry("PatchTST classifier", lambda: t.PatchTSTForClassification(t.PatchTSTConfig(
        num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, num_hidden_layers=3, d_model=32,
        num_attention_heads=4, ffn_dim=64, num_targets=4, use_cls_token=True)),
        lambda n, s: {"past_values": torch.randn(n, s, 3)}, 32, output="prediction_logits"),
    Entry("PatchTSMixer", lambda: t.PatchTSMixerForTimeSeriesClassification(t.PatchTSMixerConfig(
        num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, num_layers=3, d_model=32,
        num_targets=4)),
        lambda n, s: {"past_values": torch.randn(n, s, 3)}, 32, output="prediction_outputs"),
    Entry("CLIP, both towers", lambda: t.CLIPModel(t.CLIPConfig(
        vision_config={**IMAGE}, text_config={**TEXT, "bos_token_id": 1, "eos_token_id": 59, "projection_dim": 24},
        projection_dim=24)),
        lambda n, s: text(n, s) | {"pixel_values": torch.randn(n, 3, 16, 16)}, 12, (8, 20),
        output=["text_embeds", "image_embeds"]),
    Entry("ViLT", lambda: t.ViltForQuestionAnswering(t.ViltConfig(**{**BERT, **IMAGE, "num_labels": 5})),
        lambda n, s: text(n, s, True) | {"pixel_values": torch.randn(n, 3, 16, 16),
                                         "pixel_mask": torch.ones(n, 16, 16, dtype=torch.long)}, 12, (8,)),
]  # fmt: skip

TRANSFORMERS = [*TEXT_MODELS, *IMAGE_MODELS, *OTHER_MODELS]
