"""Trained models for others: exported files, the Hugging Face Hub, names in timm."""

from typing import Literal

__all__ = ["Format"]

Format = Literal["onnx", "torch", "aot", "executorch", "safetensors"]
