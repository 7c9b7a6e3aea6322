"""Keep every registered repository's adapter at its HEAD.

The supervisor (no torch) watches and schedules; the model worker (torch, exits when idle)
reconciles: it asks git where HEAD is and advances the stored state to it. What a hook says is
only ever a hint.
"""
