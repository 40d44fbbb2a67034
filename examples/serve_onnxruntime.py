"""Serve ONNX files by ONNX Runtime: batches of all that wait, by one head when busy and by all heads when idle."""

import asyncio
import json
import tempfile

import numpy as np
import onnxruntime
import torch

import ensemblenet
from ensemblenet.data.mnist1d import generate_mnist1d
from ensemblenet.models import MNIST1DNet


class Server:
    """Collects requests; needs neither PyTorch nor ensemblenet."""

    def __init__(self, everything: str, one: str) -> None:
        self.idle, self.busy = (onnxruntime.InferenceSession(path) for path in (everything, one))
        self.classes = json.loads(self.idle.get_modelmeta().custom_metadata_map["classes"])
        self.waiting: asyncio.Queue = asyncio.Queue()

    async def ask(self, x: np.ndarray) -> str:
        """The class of one example."""
        self.waiting.put_nowait((x, answer := asyncio.get_running_loop().create_future()))
        return await answer

    async def run(self) -> None:
        """Answer all that wait, for ever."""
        while asked := [await self.waiting.get()]:
            asked += [self.waiting.get_nowait() for _ in range(min(self.waiting.qsize(), 255))]
            session = self.busy if len(asked) > 64 else self.idle
            [logits] = await asyncio.to_thread(session.run, ["output"], {"input": np.stack([x for x, _ in asked])})
            for (_, answer), best in zip(asked, logits.argmax(1), strict=True):
                answer.set_result(self.classes[best])


async def serve(server: Server, x: np.ndarray) -> list[str]:
    """All examples at once, as many clients would ask."""
    running = asyncio.create_task(server.run())
    answers = await asyncio.gather(*map(server.ask, x))
    running.cancel()
    return answers


(x, y), (test_x, test_y) = generate_mnist1d((4000, 500))
model = ensemblenet.convert(MNIST1DNet(), x[:2], num_heads=2, split_at="input")
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for rows in torch.cat([torch.randperm(4000) for _ in range(4)]).split(100):
    optimizer.zero_grad()
    ensemblenet.CoDistillationLoss()(model.train()(x[rows]), y[rows]).backward()
    optimizer.step()
with tempfile.TemporaryDirectory() as folder:
    files = f"{folder}/all.onnx", f"{folder}/one.onnx"
    for path, head in zip(files, (None, 0), strict=True):
        ensemblenet.export(model, path, head=head, description={"classes": list("0123456789")})
    answers = asyncio.run(serve(Server(*files), test_x.numpy()))
print(f"accuracy: {np.mean([int(answer) == y for answer, y in zip(answers, test_y.tolist(), strict=True)]):.3f}")
