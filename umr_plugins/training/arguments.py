"""From a recipe to transformers' TrainingArguments."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from umr_plugins.backbones.spec import ModelSpec
from umr_plugins.encoding.options import choose_device, choose_dtype
from umr_plugins.errors import InputError, MissingExtraError
from umr_plugins.training.recipe import Recipe

_OURS = frozenset(
    "output_dir max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps "
    "learning_rate adam_beta1 adam_beta2 adam_epsilon weight_decay max_grad_norm warmup_steps save_steps "
    "save_strategy save_total_limit logging_steps logging_strategy seed data_seed bf16 fp16 use_cpu "
    "report_to disable_tqdm gradient_checkpointing activation_checkpointing remove_unused_columns "
    "ignore_data_skip resume_from_checkpoint enable_jit_checkpoint auto_find_batch_size".split()
)
"""Arguments of transformers that a recipe sets by its own keys."""
_NOT_HERE = (
    "eval_ dataloader_ do_ hub_ push_to_hub load_best_model_at_end per_device_eval_batch_size "
    "save_only_model label_ train_sampling_strategy length_column_name torch_empty_cache_steps "
    "neftune_noise_alpha include_num_input_tokens_seen accelerator_config save_on_each_node use_liger_kernel"
).split()
"""Beginnings of arguments that would have no effect (batches are our own, nothing is evaluated or uploaded),
or would leave out of a checkpoint what going on needs."""


def arguments(recipe: Recipe, spec: ModelSpec, steps: int, folder: Path) -> TrainingArguments:
    """What transformers' Trainer is told.

    Args:
        recipe: its own keys, and `trainer` for the rest.
        spec: of the model.
        steps: of the whole training.
        folder: for checkpoints.

    Raises:
        InputError: a key of `trainer` that is unknown, set by the recipe itself, without effect or refused by
            transformers, or a device that is not there.
        MissingExtraError: TensorBoard is asked for and not installed.
    """
    optimizer, device = recipe.optimizer, choose_device(recipe.device)
    extra = _extra(recipe.trainer)
    if recipe.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard: true needs TensorBoard: pip install 'umr-plugins[train]'")
    told = {
        # Buffers are constants; exchanging them would tie processes to equal numbers of chunks.
        "ddp_broadcast_buffers": False,
        "ddp_find_unused_parameters": recipe.full_vision or recipe.lora.vision,
        "logging_first_step": True,
        "lr_scheduler_type": "linear",
        **extra,
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "learning_rate": optimizer.learning_rate,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.epsilon,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "warmup_steps": math.ceil(optimizer.warmup * steps),
        "save_strategy": "steps",
        "save_steps": recipe.save_every,
        "logging_steps": recipe.log_every,
        "seed": recipe.seed,
        "bf16": choose_dtype(recipe.precision, spec, device) == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "report_to": ["tensorboard"] if recipe.tensorboard else [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    try:
        made = TrainingArguments(**told)
        chosen = made.device
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        raise InputError(f"transformers refuses what the recipe says (trainer: {extra}): {error}") from error
    if chosen.type != device.type or device.index not in (None, chosen.index):
        raise InputError(
            f"device={recipe.device!r} can't be trained on here, {chosen} can; leave device out, and "
            "choose among several GPUs by CUDA_VISIBLE_DEVICES"
        )
    made._n_gpu = min(made._n_gpu, 1)  # transformers would spread one process over all GPUs otherwise
    return made


def _extra(given: Mapping[str, Any]) -> dict[str, Any]:
    known = {each.name for each in dataclasses.fields(TrainingArguments) if each.init}
    for key in given:
        if key in _OURS:
            raise InputError(f"trainer.{key} is set by the recipe's own keys; use those")
        if key.startswith(tuple(_NOT_HERE)):
            raise InputError(f"trainer.{key} has no use in umr train; leave it out")
        if key not in known:
            near = difflib.get_close_matches(key, known - _OURS, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"trainer.{key} is no argument of transformers' TrainingArguments{meant}")
    return dict(given)
