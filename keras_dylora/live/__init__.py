"""Live models: upgraded, changed and restored while a program holds them.

This is the hard part. A user's model stays the same object, with its class,
its compile settings and its names, while its layers gain and lose weights.
Each backend keeps those weights in another place. `docs/live_models.md` says
what is tracked where.
"""
