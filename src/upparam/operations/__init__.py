"""Operations: pure functions over adapters and checkpoints, one file per verb. They know no dialect, container or base by name."""
