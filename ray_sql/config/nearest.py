"""The setting that a person meant: by the words of other tools, or by its spelling."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

OTHER_NAMES = {
    "learning_rate": "lr peak_lr base_lr",
    "num_epochs": "epochs epoch num_train_epochs n_epochs max_epochs",
    "train_batch_size": "batch_size bs batch micro_batch_size per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum_steps": "gradient_accumulation_steps gradient_accumulation accumulate_grad_batches",
    "train.global_batch_size": "effective_batch_size total_batch_size",
    "train.max_steps": "steps iters num_steps num_train_steps",
    "train.warmup_ratio": "warmup warmup_steps",
    "train.weight_decay": "wd",
    "train.lr_scheduler_type": "scheduler lr_scheduler",
    "train.optim": "optimizer",
    "train.max_grad_norm": "grad_clip gradient_clipping clip_grad",
    "train.bf16": "precision dtype fp16 torch_dtype mixed_precision",
    "rows.max_length": "max_seq_length max_seq_len model_max_length cutoff_len sequence_len",
    "rows.examples_per_row": "packing sample_packing",
    "lora.r": "rank lora_r lora_rank",
    "lora.lora_alpha": "alpha",
    "lora.lora_dropout": "dropout",
    "lora.target_modules": "lora_target lora_target_modules lora_modules",
    "quantization.load_in_4bit": "qlora quantization_bit quantize",
    "model_name": "model model_id model_name_or_path pretrained_model_name_or_path base_model",
    "dataset_id": "dataset dataset_name dataset_path data_path train_file train_data data_file",
    "data.databases": "databases db db_path db_url database_url db_dir",
    "data.validation_fraction": "val_size val_fraction val_ratio validation_split val_set_size",
    "data.test_fraction": "test_size test_ratio",
    "data.limit": "max_samples max_train_samples",
    "task_type": "task",
    "output_dir": "out out_dir output save_dir output_folder",
    "output_name": "name run_name run_id exp_name",
    "cache_dir": "cache",
    "overwrite": "overwrite_output_dir force",
    "prev_checkpoint": "resume_from_checkpoint resume_from checkpoint ckpt load_checkpoint",
    "save_steps": "save_every checkpoint_every checkpointing_steps",
    "evaluate.eval_steps": "eval_every eval_interval evaluation_strategy eval_strategy",
    "evaluate.max_new_tokens": "max_tokens max_completion_tokens max_output_tokens",
    "evaluate.limit": "max_eval_samples max_test_samples num_examples",
    "evaluate.semantics": "metric etype",
    "evaluate.processes": "num_cpus",
    "evaluate.timeout": "meta_time_out sql_timeout",
    "scaling.num_workers": "workers gpus num_gpus n_gpu nproc_per_node num_processes",
    "tracking.uri": "tracking_uri mlflow_uri mlflow_tracking_uri report_to",
    "tracking.experiment": "experiment experiment_name project",
    "tune.num_samples": "trials n_trials num_trials max_trials",
    "tune.space": "search_space param_space",
    "hub.repo_id": "hub_model_id repo repo_name",
    "publish": "push_to_hub push upload",
    "write_token": "token hub_token hf_token",
    "predictions_file": "predictions pred prediction pred_file predictions_path",
    "adapter": "adapter_path peft adapter_name_or_path lora_path lora_weights",
    "dry_run": "dryrun preview",
    "split": "splits eval_split test_split",
}
"""Names of a setting in other tools, and among people."""


def nearest(unknown: str, known: Sequence[str]) -> list[str]:
    """Return the known settings that are most likely meant; none where nothing is like it.

    A section's setting by its own name comes first, then other tools' names, then spelling.
    """
    word = unknown.replace("-", "_")
    last = word.rpartition(".")[2]
    if word in known:
        return [word]
    if same := [name for name in known if name.rpartition(".")[2] == last]:
        return same
    words = {other: name for name in known for other in OTHER_NAMES.get(name, "").split()}
    words |= {name: name for name in known}
    near = difflib.get_close_matches(word, words, 1, 0.6)
    return [words[text] for text in ([last] if last in words else near)]
