"""kronfluence on the job, as its documentation shows it; or on our backend by

python -m ekfac_fast.kronfluence ways/racers/theirs.py MODEL JOB OUT

Damping as a tenth of the mean eigenvalue, rank 32, all queries in one pass: its best here.
"""

import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from ways.racers.meter import stage

model_folder, job_file, out = sys.argv[1:]
with stage("start"):
    import numpy as np
    import torch
    from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
    from kronfluence.utils.dataset import DataLoaderKwargs
    from torch.nn import functional as F
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    from ways.racers.job import labelled

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
job = json.loads(Path(job_file).read_text())
for name, module in list(model.named_modules()):
    if isinstance(module, Conv1D):  # kronfluence knows only nn.Linear
        linear = torch.nn.Linear(*module.weight.shape)
        linear.weight.data = module.weight.data.mT.contiguous()
        linear.bias.data = module.bias.data
        model.set_submodule(name, linear)
BATCH = 32


class Rows(torch.utils.data.Dataset):
    """Token ids with their labels."""

    def __init__(self, rows):
        self.rows = labelled(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {name: torch.tensor(x) for name, x in self.rows[index].items()}


def collate(rows):
    ids, labels = ([x[name] for x in rows] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


class NextToken(Task):
    """Next tokens."""

    def compute_train_loss(self, batch, model, sample=False):
        """Cross-entropy, summed."""
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**given, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        labels = batch["labels"][:, 1:].flatten()
        if sample:
            with torch.no_grad():
                drawn = torch.multinomial(logits.softmax(-1), 1).flatten()
                labels = torch.where(labels == -100, labels, drawn)
        return F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)

    def compute_measurement(self, batch, model):
        """The same of the completion."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        """MLPs of the first blocks."""
        return job["layers"]

    def get_attention_mask(self, batch):
        """Real positions."""
        return batch["attention_mask"]


with stage("prepare"):
    torch.manual_seed(0)
    task = NextToken()
    model = prepare_model(model, task)
    analyzer = Analyzer("race", model, task, cpu=True, disable_tqdm=True, output_dir=out)
    analyzer.logger.setLevel(logging.ERROR)
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
arguments = FactorArguments("ekfac")
with stage("covariance"):
    analyzer.fit_covariance_matrices(
        "f", Rows(job["fit"]), per_device_batch_size=BATCH, factor_args=arguments
    )
with stage("eigendecomposition"):
    analyzer.perform_eigendecomposition("f", factor_args=arguments)
with stage("eigenvalue"):
    analyzer.fit_lambda_matrices(
        "f", Rows(job["fit"]), per_device_batch_size=BATCH, factor_args=arguments
    )
with stage("queries and scan"):
    queries = len(job["queries"])
    scores = ScoreArguments(
        damping_factor=None,
        query_gradient_low_rank=32,
        query_gradient_accumulation_steps=-(-queries // 8),
    )
    analyzer.compute_pairwise_scores(
        "s",
        "f",
        Rows(job["queries"]),
        Rows(job["scan"]),
        per_device_query_batch_size=min(8, queries),
        per_device_train_batch_size=BATCH,
        score_args=scores,
    )
np.save(f"{out}/scores.npy", analyzer.load_pairwise_scores("s")["all_modules"].float().numpy())
