"""One file a system: its step reads top to bottom (condition, corrupt, predict)."""
