"""``fused-po study``: what DPO and PPO do to a small model on a task whose answers can be checked."""
