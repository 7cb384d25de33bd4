"""Examples side by side in a batch: padded, and on a device."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import DataError
from .examples import IGNORED, Example


def collate(
    examples: Sequence[Example], pad_id: int = 0, side: Literal["right", "left"] = "right"
) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels and further fields, [B,T] int64, padded on `side`; values
    of examples as a whole, [B,...]. Of examples that are several sequences, all of these [S,T], an
    example's after each other.

    Padding has label -100; further fields are 0 there.
    """

    def pad(rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    names = {name for x in examples for name in x.fields}
    for name in sorted(names):
        if lacking := [x.id for x in examples if name not in x.fields]:
            raise DataError(f"some examples have {name!r}, example {lacking[0]} has none")

    def padded(values: Iterable[Tensor], value: int) -> Tensor:
        split = (one for x, own in zip(examples, values, strict=True) for one in x.split(own))
        return pad(list(split), value)

    return {
        "input_ids": padded((x.input_ids for x in examples), pad_id),
        "attention_mask": padded((torch.ones_like(x.input_ids) for x in examples), 0),
        "labels": padded((x.labels for x in examples), IGNORED),
        **{name: padded((x.fields[name] for x in examples), 0) for name in sorted(names)},
        **{name: torch.stack([x.values[name] for x in examples]) for name in examples[0].values},
    }


def collate_fields(records: list[Any], indices: Sequence[int], token: int) -> dict[str, Tensor]:
    """Every field of sequences padded to its longest: ids by the model's token, labels by -100, the
    others by 0.

    Raises:
        DataError: which of the ids are padding could not be told.
    """
    ids = [record["input_ids"] for record in records]
    if len({len(x) for x in ids}) > 1 and "attention_mask" not in records[0]:
        raise DataError(
            f"examples {indices[0]} to {indices[-1]}: input_ids of {min(map(len, ids))} to "
            f"{max(map(len, ids))} tokens and no attention_mask, so that padding would be read as "
            "text: give every example an attention_mask of ones, or batch_size=1"
        )
    fillings = {"labels": IGNORED, "input_ids": token, "decoder_input_ids": token}
    batch = {}
    for name in records[0]:
        rows = [torch.as_tensor(record[name]) for record in records]
        if rows[0].ndim:
            batch[name] = pad_sequence(rows, True, fillings.get(name, 0))
        else:
            batch[name] = torch.stack(rows)
    return batch


def moved(batch: Any, device: torch.device) -> Any:
    """Every tensor of a nested batch on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(moved(value, device) for value in batch)
    return batch
