"""One table of every DeepSeek-V3 setting: the Megatron option that sets it, its value, and how firm it is.

`size`     the dimensions of the 671B model, what depends on them, and constants that other models of the family have
           otherwise; filled in, never contradicted.
`fixed`    what makes the model a DeepSeek-V3 and its routing exact; another value is refused.
`recipe`   how it was trained; another value is refused too, unless `--allow-deviation NAME` says so.
`run`      what this run needs and Megatron has no usable default for; filled in, never contradicted.

Sources: R = technical report (arXiv 2412.19437v2), V3 = the released model's `config.json` and code.
"""

from dsv3_megatron.arguments.setting import NOT_SET, Setting
from dsv3_megatron.arguments.values import (
    batch_size,
    bf16_moments,
    by_tokens,
    communication_sms,
    cp_comm_type,
    from_rows,
    grouped_gemm,
    is_posttraining,
    min_lr,
    moe_layers,
    optimizer_checkpoint,
    rope_fusion,
    row_iters,
    rows_folder,
    same_as,
    sft,
    tokenizer_type,
    under_yarn,
    vocab_size,
    with_gate,
)
from dsv3_megatron.dualpipe.arguments import default_layout
from dsv3_megatron.recipe.arguments import MEGATRON_ARGUMENTS

MODEL = "R§4.2; V3 config.json"
ROUTING = "R§2.1.2; V3 Gate.forward"

SETTINGS: tuple[Setting, ...] = (
    # Sizes.
    Setting("num_layers", 61, "--num-layers", "size", MODEL),
    Setting("hidden_size", 7168, "--hidden-size", "size", MODEL),
    Setting("ffn_hidden_size", 18432, "--ffn-hidden-size", "size", MODEL),
    Setting("num_attention_heads", 128, "--num-attention-heads", "size", MODEL),
    Setting("q_lora_rank", 1536, "--q-lora-rank", "size", MODEL),
    Setting("kv_lora_rank", 512, "--kv-lora-rank", "size", MODEL),
    Setting("qk_head_dim", 128, "--qk-head-dim", "size", MODEL),
    Setting("qk_pos_emb_head_dim", 64, "--qk-pos-emb-head-dim", "size", MODEL),
    Setting("v_head_dim", 128, "--v-head-dim", "size", MODEL),
    Setting(
        "kv_channels",
        same_as("v_head_dim", 128),
        "--kv-channels",
        "run",
        "Megatron's head dim; MLA has its own",
    ),
    Setting("num_experts", 256, "--num-experts", "size", MODEL),
    Setting("moe_layer_freq", moe_layers, "--moe-layer-freq", "size", MODEL),
    Setting("moe_ffn_hidden_size", 2048, "--moe-ffn-hidden-size", "size", MODEL),
    Setting(
        "moe_shared_expert_intermediate_size",
        same_as("moe_ffn_hidden_size", 2048),
        "--moe-shared-expert-intermediate-size",
        "size",
        MODEL + ": one shared expert",
    ),
    Setting("moe_router_topk", 8, "--moe-router-topk", "size", MODEL),
    Setting("moe_router_num_groups", with_gate(8, 1), "--moe-router-num-groups", "size", MODEL),
    Setting("moe_router_group_topk", with_gate(4, 1), "--moe-router-group-topk", "size", MODEL),
    Setting("mtp_num_layers", 1, "--mtp-num-layers", "size", "R§2.2, §4.2: depth D = 1; 0 turns MTP off"),
    Setting("init_method_std", 0.006, "--init-method-std", "size", MODEL),
    Setting("tokenizer_type", tokenizer_type, "--tokenizer-type", "run", "byte-level BPE (R§4.1)"),
    Setting("vocab_size", vocab_size, "--vocab-size", "size", MODEL),
    Setting("sft", sft, "--sft", "run", "with --sft-data and --posttrain"),
    Setting(
        "calculate_per_token_loss",
        lambda args: True if is_posttraining(args) else NOT_SET,
        "--calculate-per-token-loss",
        "run",
        "with --posttrain: a mean over pairs, tokens or sequences of the whole batch",
    ),
    Setting(
        "tokenizer_model",
        from_rows(rows_folder),
        "--tokenizer-model",
        "run",
        "with --sft-data or --preference-data",
    ),
    Setting(
        "seq_length",
        from_rows(lambda args, report: report["seq_length"], otherwise=4096),
        "--seq-length",
        "run",
        "R§4.2; the rows of --sft-data or --preference-data",
    ),
    Setting(
        "max_position_embeddings",
        same_as("seq_length", 4096),
        "--max-position-embeddings",
        "run",
        "R§4.2, the sequence length",
    ),
    Setting("micro_batch_size", 1, "--micro-batch-size", "run", "arXiv 2505.09343: one sequence"),
    Setting("min_lr", min_lr, "--min-lr", "run", "R§4.2"),
    Setting("lr", 2.2e-4, "--lr", "run", "R§4.2; the right value depends on the model's size"),
    Setting("global_batch_size", batch_size, "--global-batch-size", "run", "R§4.2, with --train-tokens"),
    *(
        Setting(name, by_tokens(name), "--" + name.replace("_", "-"), "run", "R§4.2, from --train-tokens")
        for name in MEGATRON_ARGUMENTS
    ),
    Setting(
        "train_iters",
        from_rows(row_iters),
        "--train-iters",
        "run",
        "R§5.1: 2 epochs of --sft-data; one of --preference-data",
    ),
    Setting("eval_interval", 1000, "--eval-interval", "run", "Megatron fails without"),
    Setting("cp_comm_type", cp_comm_type, "--cp-comm-type", "run", "how the reference backend does it"),
    # Attention (R§2.1.1).
    Setting(
        "multi_latent_attention",
        True,
        "--multi-latent-attention",
        "fixed",
        "R§2.1.1",
    ),
    Setting(
        "qk_layernorm",
        True,
        "--qk-layernorm",
        "fixed",
        "R§4.2: RMSNorm after the latents",
    ),
    Setting("group_query_attention", False, "", "fixed", "R§2.1.1"),
    Setting("qk_l2_norm", False, "", "fixed", "R§2.1.1"),
    Setting("attention_output_gate", False, "", "fixed", "R§2.1.1"),
    Setting("softmax_type", "vanilla", "", "fixed", "R§2.1.1"),
    Setting(
        "experimental_attention_variant",
        None,
        "",
        "fixed",
        "R§2.1.1",
    ),
    Setting("window_size", None, "", "fixed", "R§2.1.1"),
    # Positions.
    Setting(
        "position_embedding_type",
        "rope",
        "--position-embedding-type",
        "fixed",
        "R§2.1.1; YaRN is chosen by --rope-type, since Megatron's MTP wants this one",
    ),
    Setting(
        "rope_type",
        "rope",
        "--rope-type",
        "fixed",
        "R§4.3: YaRN only for long context",
        ("yarn",),
    ),
    Setting(
        "rotary_scaling_factor",
        under_yarn("rotary_scaling_factor", 40.0),
        "--rotary-scaling-factor",
        "size",
        "R§4.3: 40 with YaRN, none before",
    ),
    Setting("mscale", under_yarn("mscale", 1.0), "--mscale", "size", "R§4.3; V3 config.json"),
    Setting(
        "mscale_all_dim",
        under_yarn("mscale_all_dim", 1.0),
        "--mscale-all-dim",
        "size",
        "R§4.3; V3 config.json",
    ),
    Setting("rotary_base", 10000, "", "size", "V3 config.json; Moonlight and Kimi-K2 have 50000"),
    Setting("rotary_percent", 1.0, "", "fixed", "R§2.1.1"),
    Setting("rotary_seq_len_interpolation_factor", None, "", "fixed", "R§4.3: YaRN instead"),
    Setting("use_rope_scaling", False, "", "fixed", "R§4.3: YaRN instead"),
    Setting("rotary_interleaved", False, "", "fixed", "MLA interleaves by itself"),
    Setting(
        "apply_rope_fusion",
        rope_fusion,
        "--no-rope-fusion",
        "size",
        "Megatron fuses MLA's rope under YaRN only",
    ),
    # Layers.
    Setting("normalization", "RMSNorm", "--normalization", "fixed", MODEL),
    Setting("layernorm_epsilon", 1e-6, "--norm-epsilon", "size", "V3 config.json; Moonlight has 1e-5"),
    Setting("layernorm_zero_centered_gamma", False, "", "fixed", MODEL),
    Setting("apply_residual_connection_post_layernorm", False, "", "fixed", MODEL),
    Setting("swiglu", True, "--swiglu", "fixed", MODEL),
    Setting("squared_relu", False, "", "fixed", MODEL),
    Setting("quick_geglu", False, "", "fixed", MODEL),
    Setting("openai_gelu", False, "", "fixed", MODEL),
    Setting("activation_func_clamp_value", None, "", "fixed", MODEL),
    Setting("add_bias_linear", False, "--disable-bias-linear", "fixed", MODEL),
    Setting("add_qkv_bias", False, "", "fixed", MODEL),
    Setting(
        "untie_embeddings_and_output_weights", True, "--untie-embeddings-and-output-weights", "fixed", MODEL
    ),
    Setting("use_mup", False, "", "fixed", MODEL),
    Setting("init_method_xavier_uniform", False, "", "fixed", "R§4.2: normal, one standard deviation"),
    Setting("hidden_dropout", 0.0, "--hidden-dropout", "recipe", MODEL),
    Setting("attention_dropout", 0.0, "--attention-dropout", "recipe", MODEL),
    # Routing.
    Setting(
        "moe_router_score_function",
        with_gate("sigmoid", "softmax"),
        "--moe-router-score-function",
        "fixed",
        ROUTING,
    ),
    Setting(
        "moe_router_enable_expert_bias",
        with_gate(True, NOT_SET),
        "--moe-router-enable-expert-bias",
        "fixed",
        ROUTING,
    ),
    Setting(
        "moe_router_topk_scaling_factor",
        2.5,
        "--moe-router-topk-scaling-factor",
        "size",
        ROUTING + "; Moonlight has 2.446, Kimi-K2 2.827",
    ),
    Setting(
        "moe_router_load_balancing_type",
        "seq_aux_loss",
        "--moe-router-load-balancing-type",
        "fixed",
        "R§2.1.2, equations 17-20",
    ),
    Setting("moe_aux_loss_coeff", 1e-4, "--moe-aux-loss-coeff", "recipe", "R§4.2: α"),
    Setting(
        "moe_router_bias_update_rate",
        1e-3,
        "--moe-router-bias-update-rate",
        "recipe",
        "R§4.2: γ, 0 after 14.3T tokens",
        (0.0,),
    ),
    Setting(
        "moe_router_dtype",
        "fp32",
        "--moe-router-dtype",
        "fixed",
        "R§3.3: gating stays in high precision",
        ("fp64",),
    ),
    Setting("moe_router_pre_softmax", False, "", "size", "V3 Gate.forward; on in V2-Lite"),
    Setting("moe_router_force_load_balancing", False, "", "recipe", ROUTING),
    Setting("moe_router_force_biased", None, "", "recipe", ROUTING),
    Setting(
        "moe_expert_capacity_factor",
        None,
        "",
        "fixed",
        "R§2.1.2: no token is dropped",
    ),
    Setting("moe_pad_expert_input_to_capacity", False, "", "fixed", "R§2.1.2: no token is dropped"),
    Setting("moe_z_loss_coeff", None, "", "fixed", ROUTING),
    Setting("moe_input_jitter_eps", None, "", "fixed", ROUTING),
    Setting("moe_latent_size", None, "", "fixed", MODEL),
    Setting("moe_shared_expert_gate", False, "", "fixed", MODEL),
    Setting("moe_apply_probs_on_input", False, "", "fixed", ROUTING),
    Setting(
        "moe_token_dispatcher_type",
        "alltoall",
        "--moe-token-dispatcher-type",
        "fixed",
        "R§3.2.2: all-to-all; flex is DeepEP, two_hop ours",
        ("flex", "two_hop"),
    ),
    Setting(
        "moe_flex_dispatcher_num_sms",
        communication_sms,
        "--moe-flex-dispatcher-num-sms",
        "run",
        "R§3.2.2: 10 channels, 20 SMs",
    ),
    Setting(
        "moe_grouped_gemm", grouped_gemm, "--moe-grouped-gemm", "run", "one GEMM call for all local experts"
    ),
    # Multi-token prediction.
    Setting(
        "mtp_loss_scaling_factor",
        0.3,
        "--mtp-loss-scaling-factor",
        "recipe",
        "R§4.2: λ, 0.1 after 10T tokens",
        (0.1,),
    ),
    Setting("mtp_use_repeated_layer", False, "", "fixed", "R§2.2"),
    Setting("mtp_detach_heads", False, "", "fixed", "R§2.2"),
    # Optimizer (R§4.2).
    Setting("optimizer", "adam", "", "fixed", "R§4.2: AdamW"),
    Setting("adam_beta1", 0.9, "", "recipe", "R§4.2"),
    Setting("adam_beta2", 0.95, "--adam-beta2", "recipe", "R§4.2"),
    Setting("adam_eps", 1e-8, "", "run", "unpublished; Megatron's default is kept"),
    Setting("weight_decay", 0.1, "--weight-decay", "recipe", "R§4.2"),
    Setting("clip_grad", 1.0, "", "recipe", "R§4.2"),
    Setting("grad_reduce_in_bf16", False, "", "recipe", "R§3.3.3: gradients are accumulated in fp32"),
    Setting("main_grads_dtype", "fp32", "", "recipe", "R§3.3.3"),
    Setting("main_params_dtype", "fp32", "", "recipe", "R§3.3.3"),
    Setting(
        "use_precision_aware_optimizer",
        bf16_moments(True),
        "--use-precision-aware-optimizer",
        "run",
        "R§3.3.3",
    ),
    Setting("exp_avg_dtype", bf16_moments("bf16"), "--exp-avg-dtype", "recipe", "R§3.3.3", ("fp32",)),
    Setting("exp_avg_sq_dtype", bf16_moments("bf16"), "--exp-avg-sq-dtype", "recipe", "R§3.3.3", ("fp32",)),
    # Pipeline.
    Setting(
        "pipeline_model_parallel_layout",
        lambda args: default_layout(args) or NOT_SET,
        "--pipeline-model-parallel-layout",
        "run",
        "stages as even as whole layers allow; unpublished for DeepSeek-V3",
    ),
    # Checkpoints.
    Setting(
        "dist_ckpt_optim_fully_reshardable",
        optimizer_checkpoint,
        "--dist-ckpt-optim-fully-reshardable",
        "run",
        "what one layout and schedule saves, any other loads; also under ZeRO-1",
    ),
    # Data.
    Setting(
        "create_attention_mask_in_dataloader",
        False,
        "--no-create-attention-mask-in-dataloader",
        "run",
        "causal attention needs no mask tensor",
    ),
)

BY_DEST = {setting.dest: setting for setting in SETTINGS}
