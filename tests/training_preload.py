"""What a training run imports; see `training_runs`."""

import peft  # noqa: F401

import umr_plugins.backbones.qwen_vl
import umr_plugins.training.run
import umr_plugins.training.trainer  # noqa: F401
