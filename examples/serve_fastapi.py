"""Serve a model by FastAPI: requests that wait become one batch, answered by all heads, or by one when many wait.

    ensemblenet export RUN --output all.onnx
    ensemblenet export RUN --output one.onnx --head 0
    uvicorn serve_fastapi:app

It needs fastapi, uvicorn, numpy and onnxruntime; neither PyTorch nor ensemblenet. Ask it:

    curl localhost:8000/predict --json '{"x": [0.1, 0.2, ...]}'
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import numpy as np
import onnxruntime
from fastapi import Body, FastAPI, HTTPException

BUSY = int(os.environ.get("BUSY", "32"))  # one head answers batches of more examples than this
LARGEST = 256  # examples in a batch
DELAY = float(os.environ.get("DELAY", "0.002"))  # seconds for which a first example waits for others

everything, one = (onnxruntime.InferenceSession(path) for path in ("all.onnx", "one.onnx"))
known = {key: json.loads(text) for key, text in everything.get_modelmeta().custom_metadata_map.items()}
waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[dict[str, Any]]]] = asyncio.Queue()


async def answer_batches() -> None:
    """Answer what waits, for ever; what fails is told to those who asked, and the next batch comes."""
    while True:
        batch = [await waiting.get()]
        await asyncio.sleep(DELAY)
        batch += [waiting.get_nowait() for _ in range(min(waiting.qsize(), LARGEST - 1))]
        session, heads = (one, 1) if len(batch) > BUSY else (everything, known["num_heads"])
        x = np.stack([example for example, _ in batch])
        try:
            [logits] = await asyncio.to_thread(session.run, ["output"], {"input": x})
        except Exception as error:
            for _, answer in batch:
                answer.set_exception(error)
            continue
        for best, (_, answer) in zip(logits.argmax(1), batch, strict=True):
            answer.set_result({"class": known["classes"][best], "heads": heads})


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Batches are answered for as long as the app runs."""
    task = asyncio.create_task(answer_batches())
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/predict")
async def predict(x: Annotated[list[Any], Body(embed=True)]) -> dict[str, Any]:
    """The class of one example, nested lists of numbers, and how many heads said so."""
    try:
        example = np.asarray(x, dtype=np.float32)
    except (TypeError, ValueError):
        example = np.empty(0)
    if list(example.shape) != known["input_shape"]:
        raise HTTPException(422, f"x must be nested lists of numbers, of the shape {known['input_shape']}.")
    answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    waiting.put_nowait((example, answer))
    return await answer
