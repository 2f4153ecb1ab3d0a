"""The train loop, its state, step, optimiser and schedules."""
