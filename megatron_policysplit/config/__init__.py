"""The configuration of a run; its dataclasses are handed on from here."""

from megatron_policysplit.config.keys import MISSING, key
from megatron_policysplit.config.rollout_schema import (
    AgreementConfig,
    OtherModeConfig,
    RolloutConfig,
    SamplingConfig,
    ServerConfig,
    WeightSyncConfig,
)
from megatron_policysplit.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    JudgeConfig,
    LogConfig,
    ModelConfig,
    ModesConfig,
    ParallelConfig,
    RunConfig,
)
from megatron_policysplit.config.training_schema import (
    METHOD_NAMES,
    AlgorithmConfig,
    RewardConfig,
    TrainConfig,
)

__all__ = [
    "METHOD_NAMES",
    "MISSING",
    "AgreementConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "JudgeConfig",
    "LogConfig",
    "ModelConfig",
    "ModesConfig",
    "OtherModeConfig",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplingConfig",
    "ServerConfig",
    "TrainConfig",
    "WeightSyncConfig",
    "key",
]
