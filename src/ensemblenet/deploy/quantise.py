"""ONNX files in integers of 8 bits, by static quantisation: calibration data shows the ranges of activations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ensemblenet.inputs import Tree, tensors_in

__all__ = ["quantise"]

_OPERATORS = ["Conv", "Gemm", "MatMul"]  # where time goes; the rest, such as the spread of heads, stays exact


def quantise(path: Path, names: Sequence[str], batches: Sequence[Tree]) -> None:
    """Replace a file's convolutions and matrix products by those of 8-bit integers; a scale for each channel.

    Args:
        path: of an ONNX file, which is overwritten.
        names: of its inputs.
        batches: inputs like those that it will meet, by which the ranges of activations are found.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            batch = next(self.batches, None)
            if batch is None:
                return None
            return {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors_in(batch), strict=True)}

    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)  # it recommends a step that changes nothing here
    try:
        quantize_static(path, path, Reader(), op_types_to_quantize=_OPERATORS, per_channel=True)
    finally:
        root.setLevel(before)
    model = onnx.load(path)
    own = [entry for entry in model.metadata_props if entry.key != "onnx.infer"]  # a note of the quantiser to itself
    del model.metadata_props[:]
    model.metadata_props.extend(own)
    onnx.save(model, path)
