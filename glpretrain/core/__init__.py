"""What every other package builds on: shared types, keys for random draws, schedules, collectives, geometry of points."""
