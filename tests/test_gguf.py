"""A model in one GGUF file is the model that was written into it."""

import json

import gguf
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from ekfac_fast.cli.inputs import load
from ekfac_fast.errors import ArgumentError

NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
TEXT = "influence functions ask which training sequence made a model say what it says\n" * 9


def write(path, model, tokenizer) -> None:
    """As llama.cpp's converter does: weights [out,in], names of its own."""
    config, file = model.config, gguf.GGUFWriter(path, "gpt2")
    file.add_context_length(config.n_positions)
    file.add_embedding_length(config.n_embd)
    file.add_block_count(config.n_layer)
    file.add_feed_forward_length(4 * config.n_embd)
    file.add_head_count(config.n_head)
    file.add_layer_norm_eps(config.layer_norm_epsilon)
    file.add_vocab_size(config.vocab_size)
    vocabulary = json.loads(tokenizer.to_str())["model"]
    file.add_tokenizer_model("gpt2")
    file.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    file.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    file.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    file.add_eos_token_id(0)
    file.add_bos_token_id(0)
    state = model.transformer.state_dict()
    for theirs, ours in (("wte", "token_embd"), ("wpe", "position_embd")):
        file.add_tensor(f"{ours}.weight", state[f"{theirs}.weight"].numpy())
    for kind in ("weight", "bias"):
        file.add_tensor(f"output_norm.{kind}", state[f"ln_f.{kind}"].numpy())
        for n in range(config.n_layer):
            for theirs, ours in NAMES.items():
                x = state[f"h.{n}.{theirs}.{kind}"]
                x = x.mT.contiguous() if x.ndim == 2 else x
                file.add_tensor(f"blk.{n}.{ours}.{kind}", x.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def test_the_model_is_what_was_written(tmp_path):
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=300, show_progress=False)
    size = tokenizer.get_vocab_size()
    config = GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    write(tmp_path / "model.gguf", model, tokenizer)
    source = load(str(tmp_path / "model.gguf"), False, "float32")
    ids = source.tokenizer(TEXT)["input_ids"]
    assert ids == tokenizer.encode(TEXT).ids
    assert source.context(None) == 512
    given = torch.tensor([ids[:64]])
    torch.testing.assert_close(source.model(given).logits, model(given).logits)


def test_what_is_no_such_file_is_named(tmp_path):
    with pytest.raises(ArgumentError, match=r"nosuch\.gguf': no such file"):
        load(str(tmp_path / "nosuch.gguf"), False)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(9))
    with pytest.raises(ArgumentError, match=r"cut\.gguf' cannot be loaded"):
        load(str(tmp_path / "cut.gguf"), False)


def test_an_architecture_that_transformers_cannot_read_is_named(tmp_path):
    file = gguf.GGUFWriter(tmp_path / "other.gguf", "mystery")
    file.add_block_count(1)
    file.add_tensor("token_embd.weight", torch.zeros(4, 8).numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    with pytest.raises(ArgumentError, match=r"other\.gguf' cannot be loaded: .* mystery is not"):
        load(str(tmp_path / "other.gguf"), False)
