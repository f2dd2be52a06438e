"""The differentiable operations, one for each thing a caller may hold."""

from fused_po.ops.linear_loss import linear_loss
from fused_po.ops.linear_token_stats import linear_token_stats
from fused_po.ops.output import LossOutput, SplitGradients
from fused_po.ops.planning import Plan, make_plan
from fused_po.ops.stats_loss import stats_loss
from fused_po.ops.token_stats import token_stats

__all__ = [
    "LossOutput",
    "Plan",
    "SplitGradients",
    "linear_loss",
    "linear_token_stats",
    "make_plan",
    "stats_loss",
    "token_stats",
]
