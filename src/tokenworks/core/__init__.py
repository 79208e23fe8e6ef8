"""What all families stand on: models, sessions, sampling, traces, data and measurement."""
