"""Which training sequences made this model say that? The whole job through the API.

    python examples/influence.py MODEL CORPUS "prompt" "completion"

MODEL is a Hugging Face causal language model (folder or name), CORPUS a .jsonl, .txt or .parquet
file or a folder of them. Results go to ./influence; ask again: the factors are kept.
"""

import sys
from hashlib import sha256

from transformers import AutoModelForCausalLM, AutoTokenizer

import ekfac_fast
from ekfac_fast.data import read, tokenize

CONTEXT = 128


def main(path: str, corpus: str, prompt: str, completion: str) -> None:
    """Fit once, ask, print the top five sequences with the tokens that matter most."""
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    data = tokenize(read(corpus), tokenizer, CONTEXT, on_empty="skip")
    question = tokenize([{"prompt": prompt, "completion": completion}], tokenizer, CONTEXT)

    factors = ekfac_fast.fit(model, data, out="influence/factors")
    queries = ekfac_fast.prepare_queries(model, factors, question, rank=32)
    asked = sha256(f"{prompt}\n{completion}".encode()).hexdigest()[:12]
    scores = ekfac_fast.score(model, queries, data, out=f"influence/scores-{asked}", per_token=True)

    print(f"log p = {-queries.measurements[0]:.2f}")
    for detail in scores.details(0)[:5]:
        ids = data[detail.index]["input_ids"]
        strongest = detail.per_token.argsort()[::-1][:5]
        words = ", ".join(repr(tokenizer.decode(ids[t])) for t in sorted(strongest))
        print(f"{detail.score / scores.train_size:+.4f}  {data.source(detail.index)}")
        print(f"         at {words}")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
