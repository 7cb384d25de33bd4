"""Tiny models of every causal class of transformers, from configurations shrunk by field name."""

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

VOCABULARY, POSITIONS, WIDTH, HEADS = 61, 64, 32, 2

# What a field of that name becomes, wherever a configuration has it.
SHRUNK: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length",
         "max_target_positions", "model_max_length", "original_max_position_embeddings"),
        POSITIONS,
    ),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "word_embed_proj_dim", "embedding_size",
         "embedding_dim", "input_embedding_size", "output_embedding_size", "lru_width",
         "attention_hidden_size", "backbone_hidden_size", "cross_attention_hidden_size"),
        WIDTH,
    ),
    **dict.fromkeys(
        ("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dff", "dim_ff",
         "d_inner", "feed_forward_size", "ffn_hidden_size", "n_inner", "expert_ffn_hidden_size",
         "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
         "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size",
         "dense_intermediate_size", "intermediate_size_mlp"),
        24,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
         "encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks",
         "num_layers_per_stack"),
        2,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads",
         "decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads",
         "num_encoder_attention_heads", "num_key_value_heads", "num_kv_heads", "index_n_heads",
         "linear_num_heads", "linear_num_key_heads", "linear_num_value_heads", "num_query_groups",
         "swa_num_attention_heads", "swa_num_key_value_heads", "o_groups"),
        HEADS,
    ),
    **dict.fromkeys(
        ("head_dim", "d_head", "dim_head", "kv_channels", "v_head_dim", "qk_nope_head_dim",
         "qk_rope_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim",
         "swa_head_dim",
         "attention_head_size", "index_head_dim", "d_rel", "d_kv", "query_pre_attn_scalar"),
        WIDTH // HEADS,
    ),
    **dict.fromkeys(("rotary_dim", "kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
         "zero_expert_num"),
        4,
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "topk_group",
         "n_group", "num_expert_group"),
        2,
    ),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "laurel_rank", "o_lora_rank"), 4),
    **dict.fromkeys(
        ("state_size", "mamba_d_state", "ssm_state_size", "mamba_headdim", "mamba_head_dim",
         "mamba_d_head", "hidden_size_per_layer_input", "adapter_rank", "router_hidden_size"),
        8,
    ),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    "first_k_dense_replace": 1,
    # Shorter than the sequences: the window is there to be seen.
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size",
                     "attention_window_size", "local_attention"), 8),
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "is_decoder": True, "causal": True, "is_encoder_decoder": False, "use_cache": False,
    "add_cross_attention": False,
}  # fmt: skip

# Set even where None, which stands for a value made of others, is the default.
ALWAYS = {
    "head_dim", "num_key_value_heads", "n_inner", "num_kv_heads", "pad_token_id", "use_cache",
    "topk_group", "n_group", "vocab_size",
}  # fmt: skip
OWN = "its own"

# Where a field's name does not say enough: by type of configuration.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY, "encoder_hash_byte_group_size": [3]},
    "blt_local_encoder": {"hidden_size_global": WIDTH},
    "blt_local_decoder": {"hidden_size_global": WIDTH},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default",
                            "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}},
    "DbrxAttentionConfig": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "DbrxFFNConfig": {"moe_top_k": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.9, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "prophetnet": {"num_hidden_layers": OWN},
    "reformer": {"axial_pos_embds": False},
    "xlnet": {"max_position_embeddings": OWN},
    "xmod": {"default_language": "en_XX"},
    # Two blocks that share a transformer.
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
              "attention_hidden_size": 64, "attention_head_dim": 32},
    "zamba2": {"num_hidden_layers": 3, "mamba_ngroups": 2,
               "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def shrunk(kind: type) -> dict[str, Any]:
    """The arguments of a configuration class that make it tiny."""
    special = SPECIAL.get(kind.model_type or kind.__name__, {})
    known = {k: x.default for k, x in kind.__dataclass_fields__.items()}
    found = {
        name: value
        for name, value in SHRUNK.items()
        if name in known and (known[name] is not None or name in ALWAYS)
    }
    parts = getattr(kind, "sub_configs", {})
    # With its parts as they are by default.
    whole = kind(**{k: v for k, v in (found | special).items() if v != OWN}) if parts else None
    for name in parts:
        part = getattr(whole, name, None)
        if part is not None:
            found[name] = type(part)(**shrunk(type(part)))
    return {k: v for k, v in (found | special).items() if v != OWN}


def classes() -> Iterator[tuple[str, str]]:
    """(class, type of configuration) of every class with a causal head, each once, by name."""
    types: dict[str, list[str]] = {}
    for model_type, name in NAMES.items():
        types.setdefault(name, []).append(model_type)
    for name, found in sorted(types.items(), key=lambda item: item[0].lower()):
        # The text part of a model of several kinds of input; else what bears the class's name.
        texts = [t for t in found if t.endswith("_text")]
        yield name, min(texts or found, key=len)


def tiny(name: str, model_type: str) -> nn.Module:
    """A model of that class, in evaluation mode, its weights drawn anew so that none are zero."""
    kind = transformers.CONFIG_MAPPING[model_type]
    model_class = getattr(transformers, name)
    # Of a model of several kinds of input, the decoder's own.
    kind = kind if issubclass(kind, model_class.config_class) else model_class.config_class
    config = kind(**shrunk(kind))
    torch.manual_seed(0)
    model = model_class._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.is_floating_point():
                noise = torch.empty(p.shape).normal_(generator=generator).to(p.dtype)
                if p.ndim > 1:
                    p.copy_(0.2 * noise)
                else:
                    p.add_(0.05 * noise)
    return model
