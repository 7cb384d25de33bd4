"""dattri-LLM's EKFACAttributor, without a store of gradients:

python -m ways.racers.dattri MODEL JOB OUT, in its own environment

Its documentation fits on the losses that it scores, the empirical Fisher; sampled labels take its
steps one by one: `fit_raw` on a task that samples, `save_fisher`, `attribute` on the plain one. It
restores the state of torch's generators after a sweep, so labels come from a generator of their
own, or both sweeps would draw the same. Weights are frozen and the embedding's output asks for
gradients, as it advises for probes. Eigendecompositions are fp32, queries dense (full rank), as
many a call as `dense_at_once` says, the damping 0.1 x the mean eigenvalue.
"""

import json
import sys
import warnings
from pathlib import Path

from .meter import stage

model_folder, job_file, out = sys.argv[1:]
with stage("start"):
    import numpy as np
    import torch
    from dattri_llm import (
        AttributionArguments,
        AttributionTask,
        EKFACAttributor,
        HookManagerConfig,
    )
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    from .job import dense_at_once, labelled

    warnings.filterwarnings("ignore", message=".*have no trainable parameter")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    model.requires_grad_(False)
    model.enable_input_require_grads()
job = json.loads(Path(job_file).read_text())
BATCH, QUERIES = 32, 8
labels_of = torch.Generator().manual_seed(0)


class Rows(torch.utils.data.Dataset):
    """Token ids with their labels, each as long as the longest of its batch: attributors take no
    function that pads.
    """

    def __init__(self, rows, batch):
        rows = labelled(rows)
        batches = [rows[at : at + batch] for at in range(0, len(rows), batch)]
        self.rows = [(row, max(len(x["labels"]) for x in rows)) for rows in batches for row in rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row, length = self.rows[index]
        ids, labels = (torch.tensor(row[name]) for name in ("input_ids", "labels"))
        short = length - len(ids)
        return {
            "input_ids": F.pad(ids, (0, short)),
            "attention_mask": F.pad(torch.ones_like(ids), (0, short)),
            "labels": F.pad(labels, (0, short), value=-100),
        }


def loss(model, batch, sample=False):
    """Cross-entropy of next tokens, summed; of sampled ones where a label is."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**given, use_cache=False).logits[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    if sample:
        with torch.no_grad():
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=labels_of).flatten()
            labels = torch.where(labels == -100, labels, drawn)
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)


def sampled(model, batch):
    """The loss whose curvature is fitted."""
    return loss(model, batch, sample=True)


given = AttributionArguments(
    output_dir=out,
    per_device_train_batch_size=BATCH,
    per_device_eval_batch_size=QUERIES,
    use_cpu=True,
)
hooks = HookManagerConfig(linear_io=[f"{name}$" for name in job["layers"]], include_frozen=True)
with stage("fit"):
    fitted = EKFACAttributor(given, task=AttributionTask(sampled, model))
    fitted.load_checkpoint(0)
    with fitted.generate_train_rep(Rows(job["fit"], BATCH), hook_config=hooks) as stream:
        factors, fisher = fitted.fit_raw(stream)
    fitted.save_fisher(factors, f"{out}/fisher", fisher=fisher)
    del fitted, stream, factors, fisher


def asked(queries: list[dict]) -> np.ndarray:
    """Scores [Q,N] of some queries.

    The attributor knows texts by their content: it has one column for queries that are equal, in
    the order of their first; its `agnostic_matrix` would add up rows.
    """
    found = scorer.attribute(
        Rows(job["scan"], BATCH),
        Rows(queries, QUERIES),
        hook_config=hooks,
        damping=0.1,
        relative_damping=True,
        fisher_dir=f"{out}/fisher",
    ).scores
    texts = [tuple(x["input_ids"]) for x in queries]
    columns = {text: at for at, text in enumerate(dict.fromkeys(texts))}
    if found.shape != (len(job["scan"]), len(columns)):
        raise SystemExit(f"scores {[*found.shape]}, not {len(job['scan'])} x {len(columns)}")
    return found[:, [columns[text] for text in texts]].T.float().numpy()


with stage("queries and scan"):
    scorer, once = EKFACAttributor(given, task=AttributionTask(loss, model)), dense_at_once(job)
    chunks = [job["queries"][at : at + once] for at in range(0, len(job["queries"]), once)]
    scores = np.concatenate([asked(chunk) for chunk in chunks])
np.save(f"{out}/scores.npy", scores)
