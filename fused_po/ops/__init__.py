"""The differentiable operations, one for each thing a caller may hold."""

from fused_po.ops.linear_loss import LossOutput, linear_loss
from fused_po.ops.linear_token_stats import linear_token_stats
from fused_po.ops.planning import Plan, make_plan
from fused_po.ops.token_stats import token_stats

__all__ = ["LossOutput", "Plan", "linear_loss", "linear_token_stats", "make_plan", "token_stats"]
