"""Sorts Megatron's flags by what they decide.

Those that decide the model's function come back with ``--use-checkpoint-args``. The command line, resuming,
``--use-checkpoint-args`` and the export all go by these tables. Names are those of the parsed args. A test compares
the tables with the installed Megatron, and sorts the fields of TransformerConfig that no flag sets
(tests/command_line/test_megatron_flags.py). This module imports neither torch nor Megatron: it answers before they are
loaded.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence

from megatron_moa.errors import UserError

VERSION = "0.19.2"  # of megatron-core, whose flags these are

Condition = Callable[[argparse.Namespace], bool]


def _on(name: str) -> Condition:
    return lambda args: bool(getattr(args, name, None))


def _position(*kinds: str) -> Condition:
    return lambda args: getattr(args, "position_embedding_type", None) in kinds


def _fixed_gelu(args: argparse.Namespace) -> bool:
    """Whether the feed-forward layers have a fixed activation and no SwiGLU."""
    return getattr(args, "moa_mixing", "none") == "none" and not args.swiglu


def has_tanh_gelu(args: argparse.Namespace) -> bool:
    """Whether a stock model computes the tanh approximation of GELU.

    Megatron does where it fuses GELU with the addition of a bias (``megatron.core.fusions.fused_bias_gelu``), which is
    its default. Elsewhere its GELU is the exact one.

    Args:
        args: of a model without mixture, validated or as a checkpoint has them.
    """
    return _has_gelu_and_bias(args) and bool(getattr(args, "bias_gelu_fusion", False))


def _has_gelu_and_bias(args: argparse.Namespace) -> bool:
    others = ("squared_relu", "quick_geglu")
    return _fixed_gelu(args) and args.add_bias_linear and not any(getattr(args, name, False) for name in others)


def _rotates(args: argparse.Namespace) -> bool:
    return _on("multi_latent_attention")(args) or _position("rope", "mrope", "yarn")(args)


def _stretches(args: argparse.Namespace) -> bool:
    return _on("multi_latent_attention")(args) or _position("yarn")(args)


def _is_half_precision(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "fp16", False) or getattr(args, "bf16", False))


def _always(args: argparse.Namespace) -> bool:
    return True


# Decides the function: which parameters the model has, and what it computes from them. A setting in a later row has an
# effect only where the condition of its row holds.
_FUNCTION: tuple[tuple[Condition, str], ...] = (
    (
        _always,
        """
    num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels group_query_attention
    multi_latent_attention normalization layernorm_epsilon layernorm_zero_centered_gamma position_embedding_type
    add_position_embedding use_rotary_position_embeddings add_bias_linear add_qkv_bias
    untie_embeddings_and_output_weights swiglu glu_linear_offset activation_func_clamp_value qk_layernorm qk_l2_norm
    attention_output_gate softmax_type window_size num_experts mtp_num_layers use_mup experimental_attention_variant
    linear_attention_freq hybrid_layer_pattern hybrid_override_pattern is_hybrid_model
    heterogeneous_layers_config_encoded_json
    """,
    ),
    (_fixed_gelu, "squared_relu quick_geglu"),
    (_has_gelu_and_bias, "bias_gelu_fusion"),  # see has_tanh_gelu
    (_on("group_query_attention"), "num_query_groups"),
    (_position("learned_absolute"), "max_position_embeddings"),
    (_position("relative"), "relative_attention_num_buckets relative_attention_max_distance"),
    (
        _rotates,
        """
    rotary_base rotary_percent rotary_interleaved rotary_seq_len_interpolation_factor use_rope_scaling no_rope_freq
    mrope_section
    """,
    ),
    (_on("use_rope_scaling"), "rope_scaling_factor"),
    (
        _stretches,
        """
    rope_type rotary_scaling_factor mscale mscale_all_dim yarn_original_max_position_embeddings yarn_beta_fast
    yarn_beta_slow yarn_correction_range_round_to_int
    """,
    ),
    (_on("window_size"), "window_attn_skip_freq"),
    (_on("multi_latent_attention"), "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim"),
    (
        _on("use_mup"),
        """
    mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power
    """,
    ),
    (
        _on("experimental_attention_variant"),
        """
    dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_skip_topk_offset
    dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon
    dsa_indexer_k_norm_fp32 linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads
    linear_num_value_heads
    """,
    ),
    (_on("mtp_num_layers"), "mtp_use_repeated_layer mtp_hybrid_override_pattern"),
    (_on("is_hybrid_model"), "mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads"),
    (_is_half_precision, "fp32_residual_connection"),
    (
        _on("num_experts"),
        """
    moe_layer_freq moe_ffn_hidden_size moe_latent_size moe_shared_expert_intermediate_size moe_shared_expert_gate
    moe_shared_expert_glu_interleave_size moe_mlp_glu_interleave_size moe_router_topk moe_router_num_groups
    moe_router_group_topk moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function
    moe_router_dtype moe_router_enable_expert_bias moe_router_load_balancing_type moe_router_force_load_balancing
    moe_router_force_biased moe_input_jitter_eps moe_apply_probs_on_input moe_expert_capacity_factor
    moe_expert_rank_capacity_factor
    """,
    ),
    (_on("moe_expert_capacity_factor"), "moe_token_drop_policy moe_pad_expert_input_to_capacity"),
)
FUNCTION = tuple(name for _, names in _FUNCTION for name in names.split())

# Decides how text becomes tokens, and how many rows the embedding has.
TOKENIZER = tuple(
    """
    tokenizer_type tokenizer_model vocab_file merge_file metadata_path special_tokens tiktoken_pattern
    tiktoken_num_special_tokens tokenizer_sentencepiece_legacy tokenizer_sentencepiece_ignore_extra_whitespaces
    tokenizer_hf_no_use_fast tokenizer_hf_no_include_special_tokens null_tokenizer_eod_id null_tokenizer_pad_id
    chat_template trust_remote_code vocab_size make_vocab_size_divisible_by pad_vocab_size padded_vocab_size
    """.split()
)

# Decides which weights a training ends with, and nothing about the function of a model that has them.
TRAINING = tuple(
    """
    adam_beta1 adam_beta2 adam_eps apply_wd_to_qk_layernorm attention_dropout batch_size calculate_per_token_loss
    clip_grad data_args_path data_parallel_random_init data_path data_sharding dataloader_inter_document_masking
    dataloader_type decoder_seq_length decoupled_lr decoupled_min_lr decrease_batch_size_if_needed
    dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss embedding_init_method_std encoder_seq_length end_weight_decay
    eod_mask_loss fim_data fim_eod_token fim_fragment_rate fim_middle_token fim_no_prefix fim_pad_token
    fim_prefix_token fim_rate fim_split_sample fim_spm_rate fim_suffix_token finetune freeze_all_layers
    global_batch_size grpo_group_size grpo_iterations grpo_prompts_per_step hidden_dropout hysteresis
    init_method_std init_method_xavier_uniform initial_loss_scale iterations_to_skip lion_beta1 lion_beta2
    logits_load_dir loss_scale loss_scale_window lr lr_decay_iters lr_decay_samples lr_decay_style
    lr_warmup_fraction lr_warmup_init lr_warmup_iters lr_warmup_samples lr_wsd_decay_iters lr_wsd_decay_samples
    lr_wsd_decay_style min_loss_scale min_lr mock_data moe_aux_loss_coeff moe_router_bias_update_rate
    moe_router_quantile_balancing_ema moe_upcycling_granularity moe_use_upcycling moe_z_loss_coeff mtp_detach_heads
    mtp_loss_scaling_factor muon_coefficient_type muon_extra_scale_factor muon_fp32_matmul_prec muon_momentum
    muon_nesterov muon_num_ns_steps muon_scalar_optimizer muon_scale_mode muon_split_qkv muon_tp_mode
    no_weight_decay_cond_type optimizer override_opt_param_scheduler per_split_data_args_path perform_initialization
    perform_rl_step phase_transition_iterations qk_clip qk_clip_alpha qk_clip_threshold reset_attention_mask
    reset_position_ids sample_rate seed seq_length sft sft_tokenizer_prompt_format sgd_momentum split
    start_weight_decay step_batch_size_schedule test_data_path train_data_path train_iters train_samples
    use_checkpoint_opt_param_scheduler valid_data_path warmup weight_decay weight_decay_incr_style
    """.split()
)

# Decides how and where it is computed, in which precision, what is logged and saved, and other programs of Megatron's.
EXECUTION = tuple(
    """
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split accumulate_allreduce_grads_in_fp32
    activation_offload_fraction adlr_autoresume adlr_autoresume_interval align_grad_reduce align_param_gather
    allow_ambiguous_pad_tokens app_tag_run_name app_tag_run_version apply_query_key_layer_scaling apply_rope_fusion
    async_ckpt_cpu_priority async_ckpt_io_priority async_ckpt_use_cpu_shm async_save async_strategy
    attention_backend attention_softmax_in_fp32 auto_detect_ckpt_format barrier_with_L1_time batch_invariant_mode
    bf16 bias_dropout_fusion bias_swiglu_fusion cache_mla_latents calc_ft_timeouts check_for_large_grads
    check_for_nan_in_loss_and_grad check_for_spiky_loss check_weight_hash_across_dp_replicas_interval
    checkpoint_activations ckpt_assume_constant_structure ckpt_convert_format ckpt_convert_save
    ckpt_convert_update_legacy_dist_opt_format ckpt_format ckpt_fully_parallel_load
    ckpt_fully_parallel_load_exchange_algo ckpt_fully_parallel_load_process_group ckpt_fully_parallel_save
    ckpt_fully_parallel_save_deprecated ckpt_fully_parallel_save_process_group ckpt_load_validate_sharding_integrity
    ckpt_step clone_scatter_output_in_embedding config_logger_dir context_parallel_size cp_comm_type
    cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers create_all_gather_group
    create_attention_mask_in_dataloader cross_entropy_fusion_impl cross_entropy_loss_fusion cuda_graph_impl
    cuda_graph_modules cuda_graph_scope_deprecated cuda_graph_warmup_steps data_cache_path
    data_parallel_sharding_strategy dataloader_defer_npy_index_mmap dataloader_fast_cache_load
    ddp_average_in_collective ddp_bucket_size ddp_num_buckets ddp_pad_buckets_for_high_nccl_busbw
    ddp_param_name_patterns_for_fp32_local_accumulation ddp_reduce_scatter_with_fp32_accumulation
    decode_only_cuda_graphs decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers decoder_num_layers
    defer_embedding_wgrad_compute delay_offload_until_cuda_graph delay_wgrad_compute
    delta_offload_bytes_across_pp_ranks deprecated_use_mcore_models deterministic_mode
    disable_bf16_reduced_precision_matmul disable_jit_fuser disable_msc_deprecated disable_straggler_on_startup
    disable_symmetric_registration dist_ckpt_format_deprecated dist_ckpt_optim_fully_reshardable
    dist_ckpt_strictness dist_ckpt_workers distrib_optim_fully_reshardable_mem_efficient
    distribute_saved_activations distributed_backend distributed_timeout_minutes
    distributed_timeout_seconds_after_init dsa_kernel_backend dump_param_to_param_group_map
    empty_unused_memory_level enable_chunked_prefill enable_cuda_graph enable_experimental enable_ft_package
    enable_msc enable_one_logger encoder_num_layers ep_overlap_early_attn_memory_release error_injection_rate
    error_injection_type eval_global_batch_size eval_interval eval_iters eval_micro_batch_size exit_duration_in_mins
    exit_interval exit_on_missing_checkpoint exit_signal exit_signal_handler exit_signal_handler_for_training
    exp_avg_dtype exp_avg_sq_dtype expert_model_parallel_size expert_tensor_parallel_num_weight_shards
    expert_tensor_parallel_size external_cuda_graph fake_process_group fault_injector_delay_start_iteration
    fault_injector_fault_delay fault_injector_fault_probabilities fault_injector_fault_types
    fault_injector_mtti_seconds fault_injector_num_ranks fault_injector_offset_seconds fault_injector_ranks
    fault_injector_seed fine_grained_activation_offloading fine_grained_offloading_max_inflight_offloads
    first_last_layers_bf16 flash_attention_version flash_decode flight_recorder_dump_on_timeout
    flight_recorder_dump_path flight_recorder_extra_dump_on_exec flight_recorder_include_only_active
    flight_recorder_include_stack_trace flight_recorder_trace_buffer_size fp16 fp16_lm_cross_entropy fp4
    fp4_param_gather fp4_quantizer_factory fp4_recipe fp8 fp8_amax_compute_algo fp8_amax_history_len fp8_interval
    fp8_margin fp8_output_proj fp8_param_gather fp8_quantizer_factory fp8_recipe fp8_wgrad
    fsdp_db_use_persist_buf_on_alloc_fail fsdp_double_buffer fsdp_manual_registration ft_num_warmup_iters
    full_validation fused_residual_rmsnorm gpu_sniff_test_interval grad_reduce_in_bf16 gradient_accumulation_fusion
    gradient_reduce_div_fusion heterogeneous_layers_config_path hierarchical_context_parallel_sizes
    high_priority_a2a_comm_stream high_priority_stream_groups hybrid_context_parallel img_h img_w
    inference_batch_times_seqlen_threshold inference_coordinator_port inference_cuda_graph_all_prefills
    inference_cuda_graph_max_tokens inference_cuda_graph_scope inference_disable_ep_consensus
    inference_disable_triton_nvls_kernels inference_dynamic_batching_async_sched_mode
    inference_dynamic_batching_block_size inference_dynamic_batching_buffer_size_gb
    inference_dynamic_batching_cuda_graph_mixed_prefill_count
    inference_dynamic_batching_cuda_graph_sizing_distribution inference_dynamic_batching_enable_prefix_caching
    inference_dynamic_batching_logprobs_mode inference_dynamic_batching_mamba_memory_ratio
    inference_dynamic_batching_max_requests inference_dynamic_batching_max_tokens
    inference_dynamic_batching_num_cuda_graphs inference_dynamic_batching_paused_buffer_size_gb
    inference_dynamic_batching_prefix_caching_coordinator_policy
    inference_dynamic_batching_prefix_caching_eviction_policy inference_dynamic_batching_prefix_caching_mamba_gb
    inference_dynamic_batching_prefix_caching_routing_alpha inference_dynamic_batching_sampling_backend
    inference_dynamic_batching_track_generated_token_events inference_dynamic_batching_track_paused_request_events
    inference_dynamic_batching_unified_memory_level inference_fuse_tp_communication inference_grouped_gemm_backend
    inference_logging_step_interval inference_max_seq_length inference_moe_disable_fused_quant_kernels
    inference_moe_token_dispatcher_type inference_rng_tracker inference_use_synchronous_zmq_collectives
    init_model_with_meta_device inprocess_active_world_size inprocess_barrier_timeout inprocess_completion_timeout
    inprocess_empty_cuda_cache inprocess_granularity inprocess_hard_timeout inprocess_heartbeat_interval
    inprocess_heartbeat_timeout inprocess_last_call_wait inprocess_monitor_process_interval
    inprocess_monitor_thread_interval inprocess_restart inprocess_soft_timeout inprocess_termination_grace_time
    keep_fp8_transpose_cache kitchen_attention_backend lazy_mpu_init load load_main_params_from_ckpt local_rank
    log_device_memory_used log_energy log_interval log_loss_scale_to_tensorboard log_max_attention_logit
    log_memory_interval log_memory_to_tensorboard log_num_zeros_in_grad log_params_norm log_progress log_straggler
    log_throughput log_timers_to_tensorboard log_validation_ppl_to_tensorboard log_world_size_to_tensorboard
    logging_level logits_save_dir logits_save_dtype logits_save_top_k logits_save_top_p logits_save_top_p_min_k
    main_grads_dtype main_params_dtype mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype
    mamba_training_ssm_states_dtype manual_gc manual_gc_eval manual_gc_interval masked_softmax_fusion
    max_seqlen_per_dp_cp_rank megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_grad_comm_dtype
    megatron_fsdp_main_grads_dtype megatron_fsdp_main_params_dtype megatron_fsdp_max_pool_double_buffer
    memory_snapshot_path micro_batch_size microbatch_group_size_per_vp_stage mid_level_dataset_surplus
    min_offloaded_tensor_size mla_down_proj_fusion mlp_chunks_for_prefill mlp_chunks_for_training mmap_bin_files
    model_parallel_size moe_deepep_num_sms moe_enable_deepep moe_enable_routing_replay moe_flex_dispatcher_backend
    moe_flex_dispatcher_num_sms moe_grouped_gemm moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
    moe_hybridep_num_sms moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs
    moe_layer_recompute moe_ncclep_static_shape moe_ncclep_zero_copy moe_pad_experts_for_cuda_graph_inference
    moe_paged_stash moe_paged_stash_buffer_size_factor_cpu moe_paged_stash_buffer_size_factor_cuda
    moe_paged_stash_page_size moe_per_layer_logging moe_permute_fusion moe_permute_fusion_into_hybridep
    moe_router_fusion moe_router_padding_for_fp8 moe_router_padding_for_quantization
    moe_routing_trace_capture_hidden_states moe_routing_trace_capture_logits moe_routing_trace_dump_weights
    moe_routing_trace_max_training_iters moe_routing_trace_path moe_shared_expert_overlap moe_single_grouped_bias
    moe_single_grouped_weight moe_token_dispatcher_type mtp_standalone multiple_validation_sets
    nccl_all_reduce_for_prefill nccl_communicator_config_path nccl_ub no_load_optim no_load_rng
    no_persist_layer_norm no_save_optim no_save_rng non_persistent_ckpt_type non_persistent_global_ckpt_dir
    non_persistent_local_ckpt_algo non_persistent_local_ckpt_dir non_persistent_save_interval
    num_dataset_builder_threads num_distributed_optimizer_instances num_layers_at_end_in_bf16
    num_layers_at_start_in_bf16 num_layers_per_virtual_pipeline_stage num_speculative_tokens
    num_virtual_stages_per_pipeline_rank num_workers nvtx_ranges object_storage_cache_path offload_modules
    offset_sampling_seed_by_dp_rank one_logger_async one_logger_project one_logger_run_name optimizer_cpu_offload
    optimizer_cuda_graph optimizer_offload_fraction outer_dp_sharding_strategy overlap_cpu_optimizer_d2h_h2d
    overlap_dispatch_backward_with_experts_wgrad overlap_grad_reduce overlap_moe_expert_parallel_comm
    overlap_p2p_comm overlap_p2p_comm_warmup_flush overlap_param_gather overlap_param_gather_with_optimizer_step
    override_ckpt_iteration patch_dim pin_cpu_grads pin_cpu_params pipeline_model_parallel_comm_backend
    pipeline_model_parallel_layout pipeline_model_parallel_size pretrained_checkpoint profile profile_ranks
    profile_step_end profile_step_start pytorch_profiler_collect_callstack pytorch_profiler_collect_chakra
    pytorch_profiler_collect_shapes recompute_activations recompute_granularity recompute_method recompute_modules
    recompute_num_layers record_memory_history record_shapes refit_method replication replication_factor
    replication_jump rerun_mode result_rejected_tracker_filename reuse_grad_buf_for_mxfp8_param_ag
    rl_consumption_granularity rl_generation_lag rl_inference_expert_model_parallel_size
    rl_inference_expert_tensor_model_parallel_size rl_inference_logprobs_is_correction
    rl_inference_model_unified_memory_level rl_inference_pipeline_model_parallel_size
    rl_inference_tensor_model_parallel_size rl_kv_cache_management_mode rl_offload_inference_model_weights_when_idle
    rl_offload_optimizer_during_inference rl_partial_rollouts rl_persist_cuda_graphs rl_profile rl_profile_dir
    rl_submission_granularity rl_training_cuda_graphs rl_use_sequence_packing run_workload_inspector_server save
    save_activations_interval save_dgrads_interval save_interval save_params_interval save_retain_interval
    save_tokens_per_expert_interval save_wgrads_interval sequence_parallel sharp_enabled_group skip_train spec
    start_eval_at_iter straggler_ctrlr_port straggler_minmax_count stream_ckpt_dequant strict_fsdp_dtensor_load
    suggested_communication_unit_size symmetric_ar_type te_precision_config_file te_rng_tracker
    tensor_model_parallel_size tensor_parallel_num_weight_shards tensorboard_dir tensorboard_log_interval
    tensorboard_queue_size test_mode timing_log_level timing_log_option torch_fsdp2_reshard_after_forward
    tp_comm_bootstrap_backend tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap tp_comm_overlap_ag
    tp_comm_overlap_cfg tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs
    train_sync_interval transformer_impl use_checkpoint_args use_cpu_initialization use_dist_ckpt_deprecated
    use_distributed_optimizer use_fused_weighted_squared_relu use_gloo_process_groups use_grouped_gemm_for_dense_mlp
    use_grouped_gemm_for_shared_expert use_kitchen_attention use_layer_wise_param_layout use_mamba_mem_eff_path
    use_megatron_fsdp use_mp_args_from_checkpoint_args use_persistent_ckpt_worker use_precision_aware_optimizer
    use_pytorch_profiler use_ring_exchange_p2p use_sharp use_te_activation_func
    use_tokenizer_model_from_checkpoint_args use_torch_fsdp2 use_torch_optimizer_for_cpu_offload
    use_tp_pp_dp_mapping use_transformer_engine_op_fuser validation_set_names verify_integrity vision_pretraining
    vision_pretraining_type wandb_entity wandb_exp_name wandb_project wandb_save_dir wgrad_deferral_limit yaml_cfg
    """.split()
)

# No line of Megatron's wheel reads them, so they are refused.
UNREAD = tuple(
    """
    apply_residual_connection_post_layernorm bert_binary_head bert_embedder_type bert_load biencoder_projection_dim
    biencoder_shared_query_context_model block_data_path classes_fraction data_per_class_fraction
    dino_bottleneck_size dino_freeze_last_layer dino_head_hidden_size dino_local_crops_number dino_local_img_size
    dino_norm_last_layer dino_teacher_temp dino_warmup_teacher_temp dino_warmup_teacher_temp_epochs
    dist_ckpt_save_pre_mcore_014 embedding_path enable_full_sharding_in_hsdp evidence_data_path
    exit_signal_handler_for_dataloader grpo_clamp_eps_lower grpo_clamp_eps_upper grpo_entropy_term_weight
    grpo_filter_groups_with_same_reward grpo_kl_beta head_lr_mult ict_head_size ict_load indexer_batch_size
    indexer_log_interval inference_dynamic_batching inference_max_requests inference_shards
    inference_text_gen_server_logging inference_wandb_logging inprocess_max_iterations
    inprocess_progress_watchdog_interval iter_per_epoch langrl_env_config logits_load_decode_threads
    logits_load_ignore_errors logits_load_kd_loss_alpha logits_load_msc_prefetch_depth logits_load_prefetch_factor
    mask_factor mask_prob mask_type max_tokens_to_oom num_channels num_classes onnx_safe openai_gelu
    output_bert_embeddings per_dataset_sequences_path query_in_block_prob rampup_batch_size
    retriever_report_topk_accuracies retriever_score_scaling rl_default_temperature rl_default_top_k
    rl_default_top_p rl_importance_sampling_truncation_coef rl_inference_parsers rl_prompts_per_eval
    rl_sequence_packing_algo rl_sequence_packing_max_sequences_per_bin rl_skip_bos_token
    rl_verify_model_weights_swap short_seq_prob swin_backbone_type titles_data_path use_flash_attn
    use_legacy_static_engine use_one_sent_docs vision_backbone_type vocab_extra_ids
    """.split()
)

# Numbers that must be above 0, and those that must not be below it; anything else would end in an error far from here.
POSITIVE = tuple(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels max_position_embeddings
    seq_length micro_batch_size global_batch_size train_iters train_samples log_interval tensorboard_log_interval
    save_interval exit_interval exit_duration_in_mins vocab_size make_vocab_size_divisible_by rotary_base
    rotary_percent layernorm_epsilon moe_ffn_hidden_size moe_router_topk moe_shared_expert_intermediate_size
    moe_latent_size moe_expert_capacity_factor adam_eps
    tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size
    expert_tensor_parallel_size eval_global_batch_size eval_micro_batch_size lr_decay_iters
    lr_decay_samples distributed_timeout_minutes rotary_seq_len_interpolation_factor rope_scaling_factor
    recompute_num_layers num_dataset_builder_threads tensorboard_queue_size initial_loss_scale loss_scale
    loss_scale_window min_loss_scale hysteresis q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank lr_wsd_decay_iters
    lr_wsd_decay_samples mup_base_hidden_size mup_embedding_mult mup_output_mult activation_func_clamp_value
    log_memory_interval save_retain_interval dist_ckpt_workers save_params_interval save_activations_interval
    save_dgrads_interval save_wgrads_interval save_tokens_per_expert_interval
    check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval
    """.split()
)
NOT_NEGATIVE = tuple(
    """
    num_experts eval_iters eval_interval num_workers seed lr min_lr lr_warmup_iters lr_warmup_samples
    lr_warmup_fraction lr_warmup_init weight_decay start_weight_decay end_weight_decay clip_grad hidden_dropout
    attention_dropout adam_beta1 adam_beta2 moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps decoupled_lr
    decoupled_min_lr sgd_momentum muon_momentum manual_gc_interval mtp_loss_scaling_factor window_attn_skip_freq
    start_eval_at_iter ckpt_step lion_beta1 lion_beta2 init_method_std embedding_init_method_std mtp_num_layers
    """.split()
)
AT_MOST_ONE = tuple(
    """
    rotary_percent hidden_dropout attention_dropout lr_warmup_fraction adam_beta1 adam_beta2 lion_beta1 lion_beta2
    """.split()
)

# How flags are spelled that are not their name: --NAME with dashes.
_ONE_NEGATIVE = frozenset(
    """
    check_for_nan_in_loss_and_grad masked_softmax_fusion bias_gelu_fusion bias_swiglu_fusion bias_dropout_fusion
    pin_cpu_grads pin_cpu_params gradient_accumulation_fusion ckpt_fully_parallel_save align_param_gather
    use_layer_wise_param_layout gradient_reduce_div_fusion mmap_bin_files create_attention_mask_in_dataloader
    data_sharding
    """.split()
)  # --no-NAME
_TWO_NEGATIVES = frozenset(
    """
    tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_split_ag tp_comm_split_rs
    dsa_indexer_rotate_activation dsa_indexer_scoring_relu fp8_wgrad clone_scatter_output_in_embedding manual_gc_eval
    use_tokenizer_model_from_checkpoint_args ckpt_load_validate_sharding_integrity strict_fsdp_dtensor_load
    stream_ckpt_dequant align_grad_reduce flight_recorder_dump_on_timeout flight_recorder_include_only_active
    flight_recorder_extra_dump_on_exec pad_vocab_size tokenizer_sentencepiece_ignore_extra_whitespaces
    log_loss_scale_to_tensorboard
    """.split()
)  # --no-NAME and --disable-NAME
_BOTH = frozenset(
    """
    rl_persist_cuda_graphs rl_partial_rollouts rl_inference_logprobs_is_correction rl_use_sequence_packing
    rl_training_cuda_graphs rl_offload_inference_model_weights_when_idle rl_verify_model_weights_swap
    rl_skip_bos_token yarn_correction_range_round_to_int inference_text_gen_server_logging inference_wandb_logging
    inference_use_synchronous_zmq_collectives inference_disable_ep_consensus
    """.split()
)  # --NAME and --no-NAME
_SPELLED = {
    "perform_initialization": ("--no-initialization",),
    "overlap_p2p_comm_warmup_flush": ("--overlap-p2p-communication-warmup-flush",),
    "microbatch_group_size_per_vp_stage": ("--microbatch-group-size-per-virtual-pipeline-stage",),
    "layernorm_epsilon": ("--norm-epsilon",),
    "layernorm_zero_centered_gamma": ("--apply-layernorm-1p",),
    "add_bias_linear": ("--disable-bias-linear",),
    "fp8": ("--fp8-format",),
    "fp4": ("--fp4-format",),
    "use_mamba_mem_eff_path": ("--disable-mamba-mem-eff-path",),
    "add_position_embedding": ("--no-position-embedding",),
    "bert_binary_head": ("--bert-no-binary-head",),
    "muon_split_qkv": ("--muon-no-split-qkv",),
    "apply_rope_fusion": ("--no-rope-fusion",),
    "deprecated_use_mcore_models": ("--use-mcore-models",),
    "override_opt_param_scheduler": ("--override-opt-param-scheduler", "--override-opt_param-scheduler"),
    "use_checkpoint_opt_param_scheduler": (
        "--use-checkpoint-opt-param-scheduler",
        "--use-checkpoint-opt_param-scheduler",
    ),
    "save_interval": ("--save-interval", "--persistent-save-interval"),
    "use_dist_ckpt_deprecated": ("--use-dist-ckpt",),
    "dist_ckpt_format_deprecated": ("--dist-ckpt-format",),
    "ckpt_fully_parallel_save_deprecated": ("--ckpt-fully-parallel-save",),
    "use_gloo_process_groups": ("--disable-gloo-process-groups",),
    "overlap_p2p_comm": ("--no-overlap-p2p-communication",),
    "nccl_ub": ("--use-nccl-ub",),
    "torch_fsdp2_reshard_after_forward": ("--torch-fsdp2-no-reshard-after-forward",),
    "metadata_path": ("--tokenizer-metadata",),
    "special_tokens": ("--tokenizer-special-tokens",),
    "barrier_with_L1_time": ("--no-barrier-with-level-1-timing",),
    "cuda_graph_scope_deprecated": ("--cuda-graph-scope",),
    "inference_dynamic_batching_enable_prefix_caching": (
        "--inference-dynamic-batching-prefix-caching",
        "--no-inference-dynamic-batching-prefix-caching",
    ),
    "offset_sampling_seed_by_dp_rank": ("--use-same-sampling-seed-across-dp-ranks",),
    "enable_one_logger": ("--no-one-logger",),
    "disable_msc_deprecated": ("--disable-msc",),
    "heterogeneous_layers_config_encoded_json": ("--heterogeneous-layers-config-encoded-json",),
}
_TURNED_OFF = frozenset(
    """
    perform_initialization add_bias_linear use_mamba_mem_eff_path add_position_embedding bert_binary_head
    muon_split_qkv apply_rope_fusion use_gloo_process_groups overlap_p2p_comm torch_fsdp2_reshard_after_forward
    barrier_with_L1_time offset_sampling_seed_by_dp_rank enable_one_logger
    """.split()
)  # those of _SPELLED whose flag makes the setting False


def spellings(name: str) -> tuple[str, ...]:
    """The flags that set one of Megatron's args, the first one for messages."""
    dashes = name.replace("_", "-")
    if name in _SPELLED:
        return _SPELLED[name]
    if name in _ONE_NEGATIVE:
        return (f"--no-{dashes}",)
    if name in _TWO_NEGATIVES:
        return (f"--no-{dashes}", f"--disable-{dashes}")
    if name in _BOTH:
        return (f"--{dashes}", f"--no-{dashes}")
    return (f"--{dashes}",)


def is_typed(name: str) -> bool:
    """Whether this process's command line sets one of the args, if only to its default."""
    return any(word.split("=", 1)[0] in spellings(name) for word in sys.argv[1:])


def is_negative(name: str) -> bool:
    """Whether a setting's flag turns it off."""
    return name in _ONE_NEGATIVE | _TWO_NEGATIVES | _TURNED_OFF


def as_typed(name: str, value: object) -> str:
    """Returns a setting as one would type it, such as ``--num-layers 4`` or ``--swiglu``.

    Where its flag is missing, the result is ``no --swiglu``.
    """
    flag = spellings(name)[0]
    if is_negative(name):
        value = not value
    if value is True:
        return flag
    if value is None or value is False:
        return f"no {flag}"
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def relevant(args: argparse.Namespace) -> Iterator[str]:
    """Those of :data:`FUNCTION` that have an effect on a model of these args."""
    for holds, names in _FUNCTION:
        if holds(args):
            yield from names.split()


def same(name: str, value: object, other: object) -> bool:
    """Whether two values of a setting mean the same model."""
    if name == "moe_router_load_balancing_type":
        return _routing(value) == _routing(other)
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return list(value) == list(other)
    return (value or None) == (other or None)  # None, 0 and False all mean "not there"


def _routing(kinds: object) -> set[str]:
    """The kinds of load balancing that choose experts otherwise than by the largest scores."""
    return {"sinkhorn", "quantile_balancing"} & set(kinds if isinstance(kinds, list | tuple) else [str(kinds)])


def known_flags() -> frozenset[str]:
    """Every flag of Megatron's parser."""
    names = (*FUNCTION, *TOKENIZER, *TRAINING, *EXECUTION, *UNREAD)
    return frozenset(flag for name in names for flag in spellings(name))


def _is_tables_version() -> bool:
    try:
        return importlib.metadata.version("megatron-core") == VERSION
    except importlib.metadata.PackageNotFoundError:
        return False


def check_words(words: Sequence[str], ours: Sequence[str]) -> None:
    """Refuses flags of a command line that nothing reads, and those that do not exist.

    Args:
        words: the command line, without the program.
        ours: this project's flags.

    Raises:
        UserError: one of them.
    """
    given = [word.split("=", 1)[0] for word in words if word.startswith("--")]
    unread = {flag for name in UNREAD for flag in spellings(name)}
    for flag in given:
        if flag in unread:
            raise UserError(f"{flag}: has no effect, no line of Megatron {VERSION} reads it; drop the flag")
        if flag == "--yaml-cfg":
            raise UserError("--yaml-cfg: a file of Megatron's settings has none of the mixture's; give flags instead")
    if not _is_tables_version():
        return  # Megatron's parser knows its own
    known = known_flags() | {*ours, "--help"}
    for flag in given:
        if flag not in known:
            close = difflib.get_close_matches(flag, known, 1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            raise UserError(f"{flag}: neither Megatron {VERSION} nor megatron_moa has such a flag; {hint}")


def check_numbers(args: argparse.Namespace) -> None:
    """Raises UserError for a number of Megatron's args that can be no setting."""
    for name, value in vars(args).items():
        if isinstance(value, float) and value != value:
            raise UserError(f"{as_typed(name, value)}: not a number; give one")
    for names, allowed, remedy in (
        (POSITIVE, lambda value: 0 < value < float("inf"), "give a number above 0"),
        (NOT_NEGATIVE, lambda value: 0 <= value < float("inf"), "give 0 or more"),
        (AT_MOST_ONE, lambda value: value <= 1, "give 1 or less"),
    ):
        for name in names:
            value = getattr(args, name, None)
            if isinstance(value, int | float) and not isinstance(value, bool) and not allowed(value):
                raise UserError(f"{as_typed(name, str(value))}: {remedy}")
