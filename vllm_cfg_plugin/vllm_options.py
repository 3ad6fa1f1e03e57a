"""Every option of `vllm serve`, and what it does for a diffusion pipeline: works, changes nothing, or is refused.

A test holds these tables against vLLM's own parser, so a new option can't be ignored in silence. Must not import vLLM
or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm_cfg_plugin.config import ONE_MACHINE, UNUSABLE_OPTIONS
from vllm_cfg_plugin.errors import ConfigurationError


def _names(*lines: str) -> tuple[str, ...]:
    return tuple(name for line in lines for name in line.split())


WORKING = frozenset(
    _names(
        "help model_tag model config served_model_name revision download_dir hf_token dtype config_format",
        # the HTTP server
        "host port uds root_path middleware api_key api_server_count shutdown_timeout max_num_queued_reqs",
        "allow_credentials allowed_origins allowed_methods allowed_headers",
        "ssl_keyfile ssl_certfile ssl_ca_certs ssl_cert_reqs ssl_ciphers enable_ssl_refresh",
        "disable_fastapi_docs enable_offline_docs h11_max_incomplete_event_size h11_max_header_count",
        "enable_request_id_headers enable_server_load_tracking fail_on_environ_validation",
        # logs, metrics, traces
        "logging_config log_level log_config_file uvicorn_log_level log_error_stack enable_log_requests",
        "disable_uvicorn_access_log disable_access_log_for_endpoints disable_log_stats aggregate_engine_logging",
        "otlp_traces_endpoint show_hidden_metrics_for_version custom_histogram_buckets",
        # the engine
        "max_num_seqs max_num_batched_tokens additional_config gpu_memory_utilization quantization cpu_offload_gb",
        "tensor_parallel_size",
        "data_parallel_size data_parallel_size_local data_parallel_rank data_parallel_start_rank headless",
        "data_parallel_address data_parallel_rpc_port data_parallel_backend data_parallel_hybrid_lb",
        "data_parallel_external_lb data_parallel_multi_port_external_lb data_parallel_supervisor_port",
        "dp_supervisor_probe_interval_s dp_supervisor_probe_timeout_s dp_supervisor_probe_failure_threshold",
        "worker_extension_cls device_ids optimization_level enforce_eager",
        "enable_lora lora_modules max_loras max_lora_rank max_cpu_loras",
    )
)

_ALREADY_SO = "it is so with a diffusion pipeline, whatever this option says"

# Options that change nothing, and need not: name -> why.
HARMLESS: dict[str, str] = {
    **dict.fromkeys(
        _names(
            "runner convert skip_tokenizer_init generation_config enable_prefix_caching async_scheduling",
            "enable_sleep_mode disable_custom_all_reduce enable_chunked_prefill trust_remote_code code_revision",
            "tokenizer_revision performance_mode use_tqdm_on_load max_parallel_loading_workers",
            "disable_hybrid_kv_cache_manager stream_interval renderer_num_workers language_model_only",
        ),
        _ALREADY_SO,
    ),
    **dict.fromkeys(
        _names(
            "max_log_len jit_monitor_mode jit_monitor_verbose enable_cumem_allocator sse_keep_alive_interval",
            "enable_flash_late_interaction skip_mm_profiling sleep_mode_backend sleep_mode_offload_cudagraph",
            "enable_nccl_comm_suspend ray_workers_use_nsight fingerprint_mode fingerprint_value",
        ),
        "it tunes what a diffusion pipeline has not, and its results would be the same",
    ),
}

_NO_LANGUAGE = "it is about generating or understanding text"
_NO_KV_CACHE = "there is no KV cache"
_OWN_LORA = "adapters adapt the transformer, in the type that dtype says, on every rank alike"
_LOADED_BY_DIFFUSERS = "diffusers loads the checkpoint, in the type that dtype says"
_OWN_KERNELS = "the model's forward is this plugin's own, in kernels of torch"
_OWN_METRICS = "it is about what language models measure; docs/operating.md lists the metrics of this plugin"
_OWN_TIMEOUT = "cfg_step_timeout says when ranks that are silent count as dead"
_OWN_INPUTS = "max_input_images, max_input_pixels and max_upload_bytes say what a request may bring along"

# Options that would do nothing where somebody expects something, beside those of `UNUSABLE_OPTIONS`: name -> remedy.
_REFUSED: dict[str, tuple[str, ...]] = {
    _NO_LANGUAGE: _names(
        "chat_template chat_template_content_format trust_request_chat_template trust_request_mm_kwargs",
        "default_chat_template_kwargs reasoning_effort_map response_role return_tokens_as_token_ids",
        "enable_auto_tool_choice exclude_tools_when_tool_choice_none tool_call_parser tool_parser_plugin",
        "tool_strict_level tool_server enable_prompt_tokens_details enable_force_include_usage",
        "enable_tokenizer_info_endpoint cohere_is_reasoning_model cohere_format anthropic_disabled_thinking_effort",
        "tokens_only grpc grpc_port enable_scale_out tokenizer_mode max_logprobs logprobs_mode logits_processors",
        "io_processor_plugin pooler_config override_generation_config return_sampling_mask use_fp64_gumbel",
        "disable_sliding_window disable_cascade_attn model_impl model_class_overrides enable_trace_replay",
        "reasoning_parser_plugin structured_outputs_config reasoning_config spec_tokens watermark_config watermark",
        "diffusion_config engram_config aux_output_config enable_return_routed_experts gdn_prefill_backend",
        "kda_prefill_backend kda_decode_backend long_prefill_token_threshold long_prefill_token_threshold_adaptive",
        "scheduler_reserve_full_isl prefill_schedule_interval max_num_scheduled_tokens max_num_active_seqs",
        "mamba_backend mamba_ssu_algorithm enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds",
    ),
    _NO_KV_CACHE: _names(
        "block_size kv_cache_memory_bytes kv_cache_dtype num_gpu_blocks_override",
        "prefix_caching_hash_algo prefix_cache_retention_interval kv_cache_dtype_skip_layers kv_sharing_fast_prefill",
        "swa_bounded_replay mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size prefix_match_unit",
        "mamba_cache_mode enable_mamba_shared_prefix_checkpoint replayssm_buffer_len use_replayssm",
        "kv_offloading_backend kv_events_config ec_manager_config",
    ),
    _OWN_LORA: _names(
        "lora_dtype enable_tower_connector_lora fully_sharded_loras lora_target_modules default_mm_loras",
        "specialize_active_lora",
        "enable_mixed_moe_lora_format enable_moe_shared_loras max_lora_cls_labels",
    ),
    ONE_MACHINE: _names(
        "master_addr master_port node_rank numa_bind numa_bind_nodes numa_bind_cpus dcp_comm_backend dcp_q_replicate",
        "dcp_kv_cache_interleave_size cp_kv_cache_interleave_size enable_hc_sp enable_batch_sharded_sampling",
        "enable_ep_weight_filter all2all_backend enable_dbo enable_shm_tensor_arena ubatch_size enable_elastic_ep",
        "elastic_ep_max_dp_size dbo_decode_token_threshold dbo_prefill_token_threshold dp_sync_interval",
        "disable_nccl_for_dp_synchronization enable_eplb eplb_config expert_placement_strategy",
        "enable_fault_tolerance fault_tolerance_config",
    ),
    _LOADED_BY_DIFFUSERS: _names(
        "hf_config_path allow_deprecated_quantization safetensors_load_strategy safetensors_prefetch_num_threads",
        "safetensors_prefetch_block_size model_loader_extra_config ignore_patterns pt_load_map_location",
        "offload_backend cpu_offload_params offload_group_size offload_num_in_group offload_prefetch_step",
        "offload_params weight_transfer_config sleep_preserve_parameter_names",
    ),
    _OWN_KERNELS: _names(
        "attention_backend attention_config compilation_config cudagraph_capture_sizes max_cudagraph_capture_size",
        "ir_op_priority enable_flashinfer_autotune monokernel moe_backend linear_backend sparse_indexer_topk_backend",
        "kernel_config profiler_config",
    ),
    _OWN_METRICS: _names(
        "enable_log_outputs enable_log_deltas enable_per_request_metrics kv_cache_metrics kv_cache_metrics_sample",
        "cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics enable_logging_iteration_details",
        "collect_detailed_traces per_request_spec_decode_metrics",
    ),
    _OWN_TIMEOUT: ("watchdog_config", "distributed_timeout_seconds", "cpu_distributed_timeout_seconds"),
    _OWN_INPUTS: _names(
        "allowed_local_media_path allowed_media_domains enable_mm_embeds media_io_kwargs mm_processor_kwargs",
        "mm_processor_cache_gb mm_processor_cache_type mm_hasher_algorithm mm_shm_cache_max_object_size_mb",
        "mm_encoder_only mm_encoder_tp_mode mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path",
        "mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin interleave_mm_strings video_pruning_rate",
        "video_pruning_method mm_tensor_ipc mm_processor_device mm_ipc_gpu_memory_gb mm_device_do_normalize",
        "disable_chunked_mm_input",
    ),
}

REFUSED: dict[str, str] = {name: remedy for remedy, names in _REFUSED.items() for name in names} | UNUSABLE_OPTIONS

# Of options that work: what is the least, where vLLM takes less or refuses it late.
_LEAST = {"max_num_seqs": 1, "max_num_queued_reqs": 1, "max_num_batched_tokens": 1, "shutdown_timeout": 0}


def check_options(options: Mapping[str, Any], vllms_default: Callable[[str], Any]) -> None:
    """Check options of vLLM for a diffusion model.

    Raises:
        ConfigurationError: an option has no use for a diffusion pipeline, or is less than can be served with.
    """
    for name, least in _LEAST.items():
        if isinstance(value := options.get(name), int) and value < least:
            raise ConfigurationError(f"{name}={value} is not valid: it must be an integer from {least} up")
    for name, remedy in REFUSED.items():
        value = options.get(name)
        if value and value != vllms_default(name):
            raise ConfigurationError(
                f"{name}={value!r} is not valid with a diffusion pipeline: leave it out ({remedy})"
            )
