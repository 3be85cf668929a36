"""One run of training: processes, weights and optimizer, checkpoints, log, held-out evaluation."""

from common.trainer.checkpoints import Checkpoints
from common.trainer.evaluator import Evaluator
from common.trainer.latents import Latents
from common.trainer.log import Clock, Log
from common.trainer.policy import Policy
from common.trainer.processes import MicroBatch, Processes

__all__ = [
    "Checkpoints",
    "Clock",
    "Evaluator",
    "Latents",
    "Log",
    "MicroBatch",
    "Policy",
    "Processes",
]
