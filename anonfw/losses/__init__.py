"""One file a loss: `(StepOut, FaceBatch) -> (B,)`."""
