"""Keys of earlier versions and of other libraries: the key to use, or why there is none.

The other libraries are TRL and transformers, Axolotl, ms-swift, LLaMA-Factory, OpenRLHF, verl, prime-rl and
Trinity-RFT. Names that resemble the key, such as lora_rank and lora_r, need no entry.
"""


def _by_name(groups: dict[str, str]) -> dict[str, str]:
    """Name -> value, from value -> names."""
    return {name: value for value, names in groups.items() for name in names.split()}


OTHER_NAMES = _by_name(
    {
        "method": "rl rlhf_type trainer_type",
        "run_name": "experiment_name wandb_name wandb_run_name",
        "run_group": "wandb_group group_name",
        "output_dir": "save_path logging_dir default_local_dir",
        "overwrite": "overwrite_output_dir",
        "resume": "resume_from_checkpoint auto_resume_from_checkpoints load_checkpoint",
        "seed": "data_seed random_seed",
        "max_steps": "total_steps total_training_steps max_train_steps train_iters",
        "num_train_epochs": "num_epochs epochs n_epochs max_epochs total_epochs total_epoches num_episodes",
        "save_steps": "save_strategy saves_per_epoch save_freq save_interval",
        "save_total_limit": "max_ckpt_num max_actor_ckpt_to_keep",
        "logging_steps": "logging_strategy logging_first_step",
        "log_completions_steps": "log_completions num_completions_to_print",
        "eval_steps": ("eval_strategy evaluation_strategy evals_per_epoch eval_interval test_freq do_eval"),
        "report_to": "use_wandb wandb_project wandb_mode project trackio_space_id use_tensorboard logger",
        "early_stopping": "stop",
        "early_stopping.max_tokens": "stop.max_tokens",
        "early_stopping.patience": "early_stopping_patience",
        "early_stopping.metric": "metric_for_best_model",
        "model.model_name_or_path": "model base_model model_id model_id_or_path model_path model_dir",
        "model.model_revision": "base_model_revision",
        "model.attn_implementation": "attn_impl flash_attention flash_attn use_flash_attn xformers_attention",
        "model.chat_template_path (a Jinja file or a tokenizer)": (
            "chat_template chat_template_jinja template"
        ),
        "model.stop_tokens (tokens as text, in addition to the model's)": (
            "eos_token eos_token_id stop_token_ids extra_eos_tokens"
        ),
        "model.lora_r": "use_peft use_lora adapter peft_type train_type tuner_type finetuning_type",
        "model.lora_alpha (the adapter's output is scaled by lora_alpha / lora_r)": (
            "use_rslora peft_use_rslora"
        ),
        "model.lora_target_modules": "lora_target_linear lora_target target_modules",
        "data.path": (
            "dataset_name dataset datasets train_dataset data_files train_files prompt_data "
            "train_data_path chord_sft_dataset taskset"
        ),
        "data.name": "dataset_config dataset_config_name",
        "data.train_on (last or all)": "mask_history assistant_only_loss",
        "data.split": "dataset_train_split train_split",
        "data.columns": "dataset_text_field field_prompt input_key prompt_key label_key output_key",
        "data.prompt_format": "data.string_prompts apply_chat_template",
        "data.system_prompt": "system default_system",
        "data.max_demonstration_length (longer rows are left out, not truncated)": (
            "max_length max_seq_length sequence_len cutoff_len max_len model_max_length truncation_mode"
        ),
        "rollout.num_generations": (
            "group_size n_samples_per_prompt repeat_times num_return_sequences rollout_n"
        ),
        "rollout.max_completion_length": (
            "max_new_tokens max_tokens response_length max_response_length generate_max_len"
        ),
        "rollout.environment (path.py:Class)": "environment_factory multi_turn_scheduler",
        "rollout.tools (path.py:function)": "tools",
        "rollout.max_tool_calling_iterations": "max_turns",
        "rollout.stop_strings": "stop_words stop_sequences stop_strs",
        "rollout.sampler": "use_vllm",
        "rollout.vllm_server_base_url": "vllm_server_host vllm_server_port",
        "rollout.vllm_timeout": "vllm_server_timeout",
        "rollout.vllm_importance_sampling_clip_max": "vllm_importance_sampling_cap",
        "rollout.max_batch_size": "rollout.max_rows per_device_eval_batch_size eval_batch_size",
        "rollout.max_resample_times (0 replaces no rollouts)": (
            "dynamic_sample filter_groups dynamic_filtering max_num_gen_batches online_difficulty_filtering"
        ),
        "rollout.max_off_policy_steps (1 for true, 0 for false)": "rollout.one_step_off async_generate",
        "rewards.functions": "reward_funcs reward_functions reward_model external_plugins reward_fn",
        "rewards.functions (each has a weight)": "reward_weights",
        "rewards.functions (get_soft_overlong_punishment)": (
            "overlong_buffer soft_max_length soft_cache_length"
        ),
        "objective.beta": "kl_coef init_kl_coef kl_loss_coef kl_ctl",
        "objective.epsilon": "clip_range eps_clip clip_ratio cliprange",
        "objective.epsilon_high": "clip_ratio_high",
        "objective.num_iterations": "ppo_epochs steps_per_generation",
        "objective.beta_pref": "pref_beta dpo_beta",
        "objective.reference_step": "sync_ref_model ref_model_sync_steps ref_model_mixup_alpha",
        "objective.scale_rewards": "norm_adv_by_std_in_grpo",
        "objective.loss_type": "loss_agg_mode policy_loss_fn loss_mode",
        "objective.entropy_coef": "entropy_loss_coef entropy_coeff",
        "teacher.model_name_or_path (and objective.teacher_kl or method opd)": (
            "teacher_model_name_or_path teacher_model"
        ),
        "objective.teacher_kl": "teacher_kl_coef distillation_loss_coef",
        "teacher.model_revision": "teacher_model_revision",
        "teacher.url (and objective.teacher_kl or method opd)": "teacher_model_server_url",
        "teacher.top_k": "loss_top_k gkd_logits_topk",
        "objective.multi_objective_aggregation": "reward_aggregation",
        "objective.mask_truncated_completions": "overlong_filter",
        "objective.mu_peak": "mu chord_mu_peak",
        "objective.mu_valley": "chord_mu_valley",
        "objective.mu_warmup_steps": "chord_mu_warmup_steps",
        "objective.mu_decay_steps": "chord_mu_decay_steps",
        "objective.sft_token_weight": "chord_enable_phi_function",
        "objective.adversarial_credit": "objective.adversarial_assignment",
        "objective.gate_threshold": "objective.gate_reward",
        "discriminator.density_ratio_reference": "discriminator.against",
        "discriminator.lora_r": "discriminator.lora_rank",
        "discriminator.in_context_demonstration": "discriminator.reads_example",
        "discriminator.replay_fraction": "discriminator.replay_share",
        "optim.learning_rate": "lr actor_learning_rate",
        "optim.lr_scheduler_type": "lr_scheduler scheduler_type",
        "optim.warmup_ratio": "lr_warmup_steps_ratio",
        "optim.max_grad_norm": "gradient_clipping grad_clip max_norm",
        "optim.gradient_checkpointing": (
            "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing_kwargs "
            "activation_offloading enable_gradient_checkpointing recompute_granularity"
        ),
        "optim.bf16": "fp16 mixed_precision",
        "batching.prompts_per_step": (
            "batch_size train_batch_size generation_batch_size rollout_batch_size global_batch_size"
        ),
        "batching.prompts_per_step (all prompts of a step; micro-batches are formed automatically)": (
            "gradient_accumulation_steps"
        ),
        "batching.prompt_selection (uniform or informative)": (
            "easy_threshold hard_threshold easy_fraction hard_fraction"
        ),
        "batching.demonstrations_per_step": "chord_sft_per_device_train_batch_size",
        "batching.per_device_train_batch_size": "micro_batch_size micro_train_batch_size",
        "batching.max_tokens_per_micro_batch": (
            "batching.max_tokens max_tokens_per_gpu ppo_max_token_len_per_gpu"
        ),
        "batching.packing": "sample_packing packing_strategy padding_free pad_to_sequence_len",
        "health.max_discriminator_accuracy": "health.max_accuracy",
        "evaluation.suites": (
            "eval_dataset val_dataset dataset_test_split val_set_size split_dataset_ratio test_datasets "
            "val_files eval_datasets"
        ),
        "evaluation.num_samples": "num_generations_eval",
        "data.revision": "dataset_revision",
    }
)

NO_EQUIVALENT = _by_name(
    {
        "after training, `uniapl export OUTPUT_DIR --push-to-hub USER/NAME` uploads the result": (
            "push_to_hub hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
            "push_to_hub_model_id"
        ),
        "`hf auth login` or the environment variable HF_TOKEN sets the token": "hub_token",
        "weights are not quantized; model.lora_r or FSDP2 saves memory": (
            "load_in_4bit load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage "
            "bnb_4bit_compute_dtype quant_bits quant_method quantization_bit"
        ),
        "weights are trained in fp32, and optim.bf16 sets the autocast": (
            "dtype torch_dtype model_dtype tf32 bf16_full_eval fp16_full_eval cast_lm_head_to_fp32 "
            "half_precision_backend"
        ),
        "processes and FSDP2 are set by `accelerate launch --config_file recipes/accelerate/fsdp2.yaml`": (
            "deepspeed fsdp fsdp_config fsdp_version ds3_gather_for_generation accelerator_config "
            "parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
            "ddp_static_graph ddp_backend ddp_timeout local_rank tensor_parallel_size "
            "pipeline_parallel_size context_parallel_size zero_stage offload_model ignore_bias_buffers"
        ),
        "the environment variable CUDA_VISIBLE_DEVICES selects the device": (
            "use_cpu no_cuda device_map n_gpus_per_node"
        ),
        "the optimizer is AdamW with PyTorch's epsilon": (
            "optim optim_args optim_target_modules adam_epsilon optimizer optimizer_type"
        ),
        "it is an argument of the schedule, in optim.lr_scheduler_kwargs": "cosine_min_lr_ratio min_lr",
        "the section model has the arguments that are supported": (
            "model_init_kwargs model_type model_kwargs lora_task_type lora_modules_to_save "
            "modules_to_save lora_target_parameters use_dora peft_use_dora freeze_vit rope_scaling "
            "unfrozen_parameters"
        ),
        "dropout is always disabled": "lora_dropout disable_dropout",
        "the rollouts' loss is one of objective.loss_type, without these settings": (
            "delta sapo_temperature_neg sapo_temperature_pos "
            "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg top_entropy_quantile "
            "use_bias_correction_kl advantage_estimator router_aux_loss_coef loss_scale"
        ),
        "the loss on preference pairs is DPO's with a sigmoid, without these settings": (
            "loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting discopop_tau "
            "pref_loss"
        ),
        "method dpo with objective.mu_peak and objective.mu_valley adds the SFT loss to pairs": (
            "rpo_alpha pref_ftx"
        ),
        "the reference reads the completions of each step": (
            "precompute_ref_log_probs precompute_ref_batch_size"
        ),
        "objective.entropy_coef is constant": (
            "use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target"
        ),
        "demonstrations have no label smoothing, and their embeddings no noise": (
            "label_smoothing_factor neftune_noise_alpha"
        ),
        "rollout and evaluation have temperature, top_p, top_k, min_p, repetition_penalty and stop_strings": (
            "generation_kwargs presence_penalty frequency_penalty no_repeat_ngram_size typical_p "
            "cache_implementation"
        ),
        "rollouts are at most one update old, and vLLM's importance weights per token are always used": (
            "off_policy_mask_threshold vllm_importance_sampling_correction "
            "vllm_importance_sampling_mode vllm_importance_sampling_clip_min shuffle_generation_batches"
        ),
        "it is an option of `vllm serve` (rollout.vllm_mode: server)": (
            "vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex "
            "vllm_guided_decoding_regex vllm_group_port vllm_max_model_length vllm_tensor_parallel_size "
            "vllm_max_model_len vllm_enforce_eager vllm_enable_prefix_caching sleep_level"
        ),
        "rollout.sampler vllm batches continuously": (
            "use_transformers_continuous_batching transformers_continuous_batching_config "
            "use_transformers_paged"
        ),
        "the tokenizer's special tokens are used": "pad_token special_tokens tokenizer_type tokens",
        "the loss covers the tokens of demonstrations and rollouts, never those of prompts": (
            "completion_only_loss train_on_inputs train_on_prompt roles_to_train label_names"
        ),
        "rows are read into memory, tokenized once and shuffled by seed": (
            "dataset_kwargs dataset_num_proc dataset_streaming streaming shuffle_dataset "
            "dataloader_drop_last dataloader_num_workers dataloader_pin_memory "
            "dataloader_persistent_workers dataloader_prefetch_factor "
            "dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy "
            "length_column_name group_by_length dataset_prepared_path preprocessing_num_workers "
            "dataset_processes shuffle_merged_datasets lazy_tokenize dataset_shuffle overwrite_cache"
        ),
        "reward functions get every column": "remove_unused_columns",
        "micro-batches are packed, and one that does not fit in memory is split": (
            "pad_to_multiple_of eval_packing auto_find_batch_size torch_empty_cache_steps use_cache "
            "average_tokens_across_devices"
        ),
        "the head is computed in chunks, and the model runs without compilation": (
            "torch_compile torch_compile_backend torch_compile_mode use_liger_kernel "
            "liger_kernel_config use_liger liger_kernel plugins use_unsloth"
        ),
        "every step is in metrics.jsonl, and every completion in completions.jsonl": (
            "log_multimodal log_unique_prompts log_on_each_node logging_nan_inf_filter "
            "include_num_input_tokens_seen include_tokens_per_second log_completions_hub_repo"
        ),
        "--quiet hides the output, and the logger 'uniapl' has it in Python": (
            "log_level log_level_replica disable_tqdm debug skip_memory_metrics verbose"
        ),
        "the tracker's own environment variables set it": (
            "trackio_bucket_id trackio_static_space_id wandb_entity wandb_run_id wandb_watch "
            "wandb_log_model swanlab_project"
        ),
        "evaluation.suites are evaluated every eval_steps and at the end": (
            "eval_delay prediction_loss_only eval_do_concat_batches eval_use_gather_object "
            "eval_accumulation_steps include_for_metrics batch_eval_metrics do_predict "
            "predict_with_generate eval_sample_packing eval_limit"
        ),
        "load_best_model_at_end makes the best checkpoint the result": "best_model_strategy",
        "a checkpoint always contains what an exact resume needs": (
            "save_only_model save_on_each_node enable_jit_checkpoint ignore_data_skip "
            "restore_callback_states_from_checkpoint full_determinism save_safetensors"
        ),
        "the verb decides it: `uniapl train`, `uniapl evaluate`": "do_train",
        "`uniapl export` merges an adapter": "merge_lora export_dir",
    }
)
