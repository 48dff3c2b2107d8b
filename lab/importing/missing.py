"""Options of ReaLLM-Forge that have no counterpart here: which of them change nothing, and at which values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def _off(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Switches of things that do not exist here, by the value at which they change nothing.
OFF: Mapping[str, Any] = {
    **_off(
        """use_peri_ln use_post_ln use_parallel_mlp gate use_moe use_lsv use_qk_norm_scale use_v_norm use_flash_lobo
        use_fire_embeddings shared_mlp_sym shared_attn_sym use_attn_resid_scaling use_mlp_resid_scaling use_attn_resid_const
        use_mlp_resid_const use_ln_f_input_mixer l2_norm_mlp_up l2_norm_mlp_down l2_norm_attn_q l2_norm_attn_k l2_norm_attn_v
        l2_norm_attn_cproj mlp_post_act_l2_norm attn_post_act_l2_norm learn_mlp_x_offset learn_mlp_y_offset
        use_embedding_scale use_edgellm_asic use_gradual_activation multicontext dataset_interleaving div_by_seq_len
        muon_include_all_weights""",
        False,
    ),
    **_off(
        """window_size n_embd_wte norm_variant_wte norm_variant_abs norm_variant_lm_head mlp_up_bias mlp_down_bias
        attn_logit_softcapping final_logit_softcapping use_flash_norm dataset_list patience gns_type loss_schedule
        distillation_loss distillation_teacher_ckpt use_pre_ln_attn use_pre_ln_mlp use_peri_ln_attn use_peri_ln_mlp
        use_post_ln_attn use_post_ln_mlp quantize_wte quantize_wpe max_epochs max_seconds""",
        None,
    ),
    **_off("shared_mlp_size shared_attn_size shared_mlp_seq shared_attn_seq mlp_down_projs", 1),
    **_off("mlp_x_offset mlp_y_offset embedding_gaussian_noise_std linear_mean_init embedding_mean_init", 0.0),
    **_off("mlp_cproj_scale attn_cproj_scale", 1.0),
    **_off("softmax_variant_attn softmax_variant_output", "softmax"),
    **_off("linear_variant_attn linear_variant_mlp", "linear"),
    **_off("attn_residual_combination mlp_residual_combination", "add"),
    "use_pre_ln": True,
    "loss_fn": "cross_entropy",
    "init_variant": "gaussian",
    "init_from": "scratch",
    "sampling_method": "random",
    "training_mode": "single",
    "attention_residual_variant": "standard",
}

# Options that say what is logged, saved, drawn or recomputed, and nothing about what is learned.
_BOOKKEEPING = re.compile(
    r"_.*|out_dir|timestamp|(tensorboard|csv|wandb|log|zeus|export|print|sample|colorize|colorization|plot|statistic|softmax_io)_.*"
    r"|(never|always|only)_save_checkpoint(_at_end)?|save_(major_ckpt_interval|nan_checkpoint|config_json)|eta_variant|statistic|backend"
    r"|time_remaining_mode|iteration_window|eval_cycle_window|compute_model_stats|model_stats_device|create_statistics|graph_type"
    r"|max_sample_tokens|num_samples|temperature|top_k|dataset_benchmarks|interactive|onnx_output|l2_norm_print_dims"
    r"|use_gradient_checkpointing|recompute_backward_pass|run_name_override|distillation_source_(path|run_name)|box_plot_.*"
    r"|consmax_beta_gamma_logging"
)


def is_bookkeeping(key: str) -> bool:
    """Whether an option is without influence on what is learned."""
    return _BOOKKEEPING.fullmatch(key) is not None


def is_off(key: str, value: Any) -> bool:
    """Whether a value leaves a thing that does not exist here switched off."""
    if key not in OFF:
        return False
    off = OFF[key]
    if isinstance(off, (int, float)) and not isinstance(off, bool):
        try:
            return not isinstance(value, bool) and float(value) == off
        except (TypeError, ValueError):
            return False
    return value is None or (value is off if isinstance(off, bool) else value == off)
