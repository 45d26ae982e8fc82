"""Live models: upgraded, changed and given back while a program holds them.

This is the hard part. A user's model stays the same object, with its class,
its compiled settings and its names, while its layers gain and lose weights;
and each backend keeps those weights in another place. `docs/live_models.md`
tells what is tracked where.
"""
