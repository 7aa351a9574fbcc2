"""What a worker does of a task, phase by phase: training, evaluation, routing."""
