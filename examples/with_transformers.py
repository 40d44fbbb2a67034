"""Hugging Face's Trainer on a converted text classifier: a loss of its own, evaluation, saving and loading."""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DistilBertConfig, Trainer, TrainingArguments

import ensemblenet
from ensemblenet.functional import combine_heads


class CoDistillationTrainer(Trainer):
    """Learns all heads, and evaluates what they say together."""

    criterion = ensemblenet.CoDistillationLoss(weight=2.0)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, and with `return_outputs` the logits (N, C)."""
        labels = inputs.pop("labels")
        heads = model(**inputs, per_head=True)  # (K, N, C)
        loss = self.criterion(heads, labels)
        return (loss, {"logits": combine_heads(heads)}) if return_outputs else loss


torch.manual_seed(0)
labels = torch.randint(4, (2000,))
ids = torch.randint(10, 60, (2000, 16))  # made-up texts: words, one of them a word of the class, and padding
ids[torch.arange(2000), torch.randint(8, (2000,))] = 5 + labels
mask = (torch.arange(16) < torch.randint(8, 17, (2000, 1))).long()
texts = [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids * mask, mask, labels, strict=True)]
config = DistilBertConfig(vocab_size=60, dim=64, hidden_dim=128, n_layers=2, n_heads=4, dropout=0.0, num_labels=4)
base = AutoModelForSequenceClassification.from_config(config)
example = {"input_ids": ids[:4], "attention_mask": mask[:4]}
model = ensemblenet.convert(base, example, num_heads=2, output="logits")

with tempfile.TemporaryDirectory() as folder:
    trainer = CoDistillationTrainer(
        model,
        TrainingArguments(
            f"{folder}/trainer", num_train_epochs=4, per_device_train_batch_size=32, learning_rate=2e-3, use_cpu=True,
            label_names=["labels"], remove_unused_columns=False,  # the model's signature does not name them
            report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=texts[:1500],
        eval_dataset=texts[1500:],
        compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(1) == result.label_ids).mean()},
    )  # fmt: skip
    trainer.train()
    print(f"accuracy: {trainer.evaluate()['eval_accuracy']:.3f}")
    again = ensemblenet.load(ensemblenet.save(model, f"{folder}/saved"), base)
    assert torch.equal(again(**example), model.eval()(**example))
