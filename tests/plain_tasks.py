"""Harness: tasks as kronfluence's users write them: a loss, which is the measurement, too."""

from torch.nn import functional as F


class Plain:
    """All but the loss. `tracked` layers; None for the default."""

    def __init__(self, tracked=None):
        self.tracked = tracked

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return self.tracked

    def get_attention_mask(self, batch):
        return None


class Squares(Plain):
    """Squared error of (input, target)."""

    def compute_train_loss(self, batch, model, sample=False):
        return F.mse_loss(model(batch[0]), batch[1], reduction="sum")


class Translation(Plain):
    """An encoder and a decoder; the source's mask goes to the model with its batch."""

    def compute_train_loss(self, batch, model, sample=False):
        logits = model(**batch).logits.flatten(0, 1)
        return F.cross_entropy(
            logits, batch["labels"].flatten(), ignore_index=-100, reduction="sum"
        )
