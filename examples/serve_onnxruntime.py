"""Run an exported file by ONNX Runtime: the prediction, what each head says, and how far heads differ."""

import json
import tempfile

import numpy as np
import onnxruntime
import torch

import ensemblenet
from ensemblenet.data.mnist1d import generate_mnist1d
from ensemblenet.models import MNIST1DNet


def answers(path: str, x: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The classes of examples, and the spread of heads; needs neither PyTorch nor ensemblenet."""
    session = onnxruntime.InferenceSession(path)
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    logits, spread = session.run(["output", "spread"], {"input": x})
    return [classes[best] for best in logits.argmax(1)], spread


(x, y), (test_x, test_y) = generate_mnist1d((4000, 500))
model = ensemblenet.convert(MNIST1DNet(), x[:2], num_heads=2, split_at="input")
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for rows in torch.cat([torch.randperm(4000) for _ in range(4)]).split(100):
    optimizer.zero_grad()
    ensemblenet.CoDistillationLoss()(model.train()(x[rows]), y[rows]).backward()
    optimizer.step()
with tempfile.TemporaryDirectory() as folder:
    path = f"{folder}/model.onnx"
    ensemblenet.export(model, path, description={"classes": list("0123456789")})
    classes, spread = answers(path, test_x.numpy())
right = np.array([int(name) == y for name, y in zip(classes, test_y.tolist(), strict=True)])
print(f"accuracy: {right.mean():.3f}")
sure = spread < np.median(spread)
print(f"where heads agree more than in the median: {right[sure].mean():.3f}, where less: {right[~sure].mean():.3f}")
