"""ekfac_fast's driver: python -m ways.racers.ours MODEL JOB OUT float32|bfloat16"""

import json
import sys
from pathlib import Path

from .meter import stage

model_folder, job_file, out, dtype = sys.argv[1:]
with stage("start"):
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    import ekfac_fast

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
job = json.loads(Path(job_file).read_text())
passes = {"autocast": torch.bfloat16 if dtype == "bfloat16" else None}
data = {part: [{"input_ids": x} for x in job[part]] for part in ("fit", "scan")}
with stage("fit"):
    where = {"out": f"{out}/factors", "layers": job["layers"]}
    factors = ekfac_fast.fit(model, data["fit"], **where, **passes)
with stage("queries"):
    queries = ekfac_fast.prepare_queries(model, factors, job["queries"], rank=32, **passes)
with stage("scan"):
    scores = ekfac_fast.score(model, queries, data["scan"], out=f"{out}/scores", **passes)
np.save(f"{out}/scores.npy", scores.matrix)
print(json.dumps({"stages": factors.seconds | scores.stages}))
