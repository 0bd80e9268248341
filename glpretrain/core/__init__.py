"""What every other package builds on: shared types, keys for random draws, schedules, collectives, geometry of points.

Its modules are imported one by one, since the command that cuts slides uses `core.imports` and must not pay for torch.
"""
