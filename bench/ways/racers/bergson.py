"""bergson by the steps of its command `ekfac`, which fits and scores one data set; here are two:

python -m ways.racers.bergson MODEL JOB OUT, in its own environment

`kfac` with `ev_correction`, factors in fp32, eigendecompositions in fp64, labels sampled anew in
each of two sweeps, summed losses, damping 0.1 x the mean eigenvalue: its defaults for exact EK-FAC.
Queries are dense (full rank) and on disk, as many a pass as `dense_at_once` says. Each step loads
the model; files that it maps count as its memory.
"""

import json
import logging
import sys
from pathlib import Path

from .meter import stage

model_folder, job_file, out = sys.argv[1:]
with stage("start"):
    import numpy as np
    import torch
    from bergson.build import build_query
    from bergson.collector.collector import HookCollectorBase
    from bergson.config import InversionConfig
    from bergson.config.config import (
        DataConfig,
        HessianConfig,
        IndexConfig,
        PreprocessConfig,
        QuerySetConfig,
        ScoreConfig,
    )
    from bergson.data import load_scores
    from bergson.hessians.apply_hessian import EkfacConfig, apply_worker
    from bergson.hessians.hessian_approximations import approximate_hessians
    from bergson.score.score import score_dataset
    from bergson.utils.worker_utils import max_tokens_for_model
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from .job import dense_at_once, labelled

    logging.disable(logging.INFO)
    torch.manual_seed(0)
job = json.loads(Path(job_file).read_text())
TOKENS = 4096  # of a batch, as the others' 32 sequences; at most what the model sees: its own limit


def others() -> str:
    """Names of the layers that bergson would track beside the job's, as it wants them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    known = HookCollectorBase.discover_targets(model.base_model)
    prefix = f"{model.base_model_prefix}."
    return ",".join(set(known) - {name.removeprefix(prefix) for name in job["layers"]})


def data(part: str) -> DataConfig:
    """A part of the job as a data set on disk."""
    Dataset.from_list(labelled(job[part])).save_to_disk(f"{out}/data/{part}")
    return DataConfig(dataset=f"{out}/data/{part}")


def index(folder: str, part: DataConfig) -> IndexConfig:
    """What every step is told: where to, the model, the data, the layers to leave out."""
    return IndexConfig(
        run_path=f"{out}/{folder}",
        model=model_folder,
        data=part,
        token_batch_size=tokens,
        filter_modules=skipped,
    )


with stage("prepare"):
    skipped = others()
    longest = max_tokens_for_model(AutoTokenizer.from_pretrained(model_folder), model_folder, None)
    tokens = min(TOKENS, longest)
    fitted, scanned, asked = (data(part) for part in ("fit", "scan", "queries"))
with stage("fit"):
    approximate_hessians(index("kfac", fitted), HessianConfig(method="kfac", ev_correction=True))
with stage("queries"):
    queries = QuerySetConfig.from_data(asked)
    build_query(index("queries", asked), queries, PreprocessConfig())
    where = EkfacConfig(f"{out}/kfac", f"{out}/queries", f"{out}/inverse", ev_correction=True)
    Path(where.run_path).mkdir()
    apply_worker(0, 0, 1, where, InversionConfig())
with stage("scan"):
    passes = ScoreConfig(query_path=where.run_path, query_batch_size=dense_at_once(job))
    score_dataset(index("scores", scanned), passes, PreprocessConfig())
np.save(f"{out}/scores.npy", load_scores(Path(out, "scores"))[:].T)
